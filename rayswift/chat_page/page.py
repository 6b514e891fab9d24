"""The page: a conversation, and beside it the model, the system prompt and the sampling."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import resources
from typing import Any

import gradio as gr

from rayswift.chat_page.conversation import MATHS, show_as_written, split_thoughts
from rayswift.chat_page.messages import INLINE, NOTE, openai_messages
from rayswift.errors import UserError
from rayswift.generate.endpoint import EndpointEngine
from rayswift.generate.types import Answer, SamplingParams

TEXTS: dict[str, dict[str, str]] = json.loads(
    resources.files(__package__).joinpath("texts.json").read_text(encoding="utf-8")
)
SECONDS_KEPT = 24 * 3600  # of uploaded files
MOST_TOKENS = 8192  # end of the slider


def build_page(
    engine: EndpointEngine,
    params: SamplingParams,
    *,
    title: str,
    lang: str = "en",
    system: str | None = None,
    media: Sequence[str] = (),
    stream: bool = True,
) -> gr.Blocks:
    """The page over ``engine``; ``params`` are the first values of the controls, ``media`` the uploads offered."""
    with gr.Blocks(title=title, fill_height=True, analytics_enabled=False, delete_cache=(3600, SECONDS_KEPT)) as page:
        with gr.Sidebar(width=300):
            gr.Markdown(f"## {title}")
            names = [(words["name"], code) for code, words in TEXTS.items()]
            language = gr.Radio(names, value=lang, elem_id="language", **words_of("language", lang))
            controls = make_controls(engine, params, system, lang)
        chatbot = show_as_written(gr.Chatbot(
            elem_id="conversation", scale=1, buttons=["copy", "copy_all"], feedback_options=None,
            latex_delimiters=MATHS, **words_of("conversation", lang),
        ))  # fmt: skip
        question = make_question(media, lang)
        gr.ChatInterface(
            answerer(engine, params, stream),
            chatbot=chatbot,
            textbox=question,
            multimodal=bool(media),
            additional_inputs=[*controls.values(), language],
            editable=True,
            concurrency_limit=None,
            api_visibility="private",
        )
        shown = {"language": language, **controls, "conversation": chatbot, "question": question}
        language.change(
            lambda code: [gr.update(**words_of(name, code)) for name in shown],
            language, list(shown.values()), show_progress="hidden", api_visibility="private",
        )  # fmt: skip
        # Adapters come and go while the page is open: each visit lists them anew.
        page.load(lambda: gr.update(choices=served(engine)), None, controls["model"], api_visibility="private")
    return page


def make_controls(
    engine: EndpointEngine, params: SamplingParams, system: str | None, lang: str
) -> dict[str, gr.components.Component]:
    """What the user sets for an answer, in the order :func:`answerer` takes it.

    Temperature and top p rest, and the model's own sampling counts, unless a flag set one of them.
    """

    def shared(name: str) -> dict[str, Any]:
        return {"elem_id": name, **words_of(name, lang)}

    by_hand = params.temperature is not None or params.top_p is not None
    temperature, top_p = _first(params.temperature, 0.7), _first(params.top_p, 1.0)
    longest = params.max_new_tokens or 0
    model = gr.Dropdown(served(engine), value=engine.model, allow_custom_value=True, **shared("model"))
    prompt = gr.Textbox(system or "", lines=3, **shared("system"))
    length = gr.Slider(0, max(MOST_TOKENS, longest), longest, step=1, **shared("max_new_tokens"))
    own = gr.Checkbox(not by_hand, **shared("own_sampling"))
    sliders = {
        "temperature": gr.Slider(0, 2, temperature, step=0.05, interactive=by_hand, **shared("temperature")),
        "top_p": gr.Slider(0.05, 1, top_p, step=0.05, interactive=by_hand, **shared("top_p")),
    }
    own.change(
        lambda rest: [gr.update(interactive=not rest) for _ in sliders],
        own, list(sliders.values()), show_progress="hidden", api_visibility="private",
    )  # fmt: skip
    return {"model": model, "system": prompt, "max_new_tokens": length, "own_sampling": own, **sliders}


def _first(value: float | None, otherwise: float) -> float:
    return otherwise if value is None else value


def make_question(media: Sequence[str], lang: str) -> gr.Textbox | gr.MultimodalTextbox:
    """Where the user writes; with upload where the model takes files."""
    shared: dict[str, Any] = {
        "submit_btn": True, "stop_btn": True, "autofocus": True, "show_label": False, "elem_id": "question",
        "max_lines": 20, **words_of("question", lang),
    }  # fmt: skip
    if media:
        return gr.MultimodalTextbox(file_types=list(media), file_count="multiple", **shared)
    return gr.Textbox(**shared)


def words_of(name: str, lang: str) -> dict[str, Any]:
    """What a component says in a language, as its properties."""
    words = TEXTS[lang]
    found = {"label": words.get(name, "")}
    if name == "conversation":
        found["placeholder"] = words["empty"]
    elif name == "question":
        found = {"placeholder": words["question"]}
    elif name == "system":
        found["placeholder"] = words["system_placeholder"]
    if info := words.get(f"{name}_info"):
        found["info"] = info
    return found


def served(engine: EndpointEngine) -> list[str]:
    """The names to choose from; the one in use stands among them even if the endpoint does not list it."""
    return list(dict.fromkeys([*engine.models(), engine.model]))


def answerer(engine: EndpointEngine, params: SamplingParams, stream: bool) -> Callable[..., Iterator[Any]]:
    """The function that Gradio calls for each question; it yields the answer as it grows, or a note of an error.

    When the user stops, Gradio closes the iterator, the connection closes, and the server drops the request.
    """

    def answer(
        question: str | Mapping[str, Any],
        history: list[dict[str, Any]],
        model: str,
        system: str,
        max_new_tokens: int,
        own_sampling: bool,
        temperature: float,
        top_p: float,
        lang: str = "en",
    ) -> Iterator[Any]:
        asked = dataclasses.replace(engine, model=model)
        chosen = dataclasses.replace(
            params,
            max_new_tokens=int(max_new_tokens) or None,
            temperature=None if own_sampling else temperature,
            top_p=None if own_sampling else top_p,
        )
        shown: list[Any] = []
        try:
            messages = openai_messages(history, question, system)
            if not stream:
                yield said(asked.complete(messages, chosen), lang)
                return
            for _ in asked.stream(messages, chosen):
                shown = said(asked.last_stream, lang)
                yield shown
        except UserError as error:
            # Not gr.Error: Gradio's chat then keeps the box closed. A note in the conversation can be read at leisure.
            yield [*shown, gr.ChatMessage(str(error), metadata={"title": NOTE})]

    return answer


def said(answer: Answer, lang: str) -> list[Any]:
    """An answer as Gradio's messages, its thoughts folded (open while they grow)."""
    inline = None if answer.thoughts else split_thoughts(answer.text)
    thoughts, text = inline or (answer.thoughts, answer.text)
    if not thoughts.strip():
        return [text]
    metadata: dict[str, Any] = {"title": TEXTS[lang]["thoughts"], "status": "done" if text.strip() else "pending"}
    if inline:
        metadata["id"] = INLINE
    return [gr.ChatMessage(thoughts, metadata=metadata), *([text] if text.strip() else [])]  # type: ignore[arg-type]
