"""Generate with Transformers in this process: batches, and one conversation as a stream of text.

Prompts are the ids of training (``rayswift.data.tokens.encoder``), so a fine-tuned model is asked as it was taught.
"""

from __future__ import annotations

import copy
import logging
import os
import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from rayswift.data.tokens.encoder import Encoder
from rayswift.errors import UserError, one_line
from rayswift.generate.text_stream import TextStream, TokenQueue, cut_at_stop_word
from rayswift.generate.types import Answer, GenerationSettings, Messages
from rayswift.modeling.adapters import load_adapter
from rayswift.modeling.loading import add_special_tokens, load_model, read_config, resolve_dtype, supports_bfloat16

logger = logging.getLogger("rayswift.generate.transformers")


@dataclass
class TransformersEngine:
    """A model in memory and the encoder of its prompts. Make one with :meth:`load`."""

    model: Any
    encoder: Encoder
    context_length: int
    last_stream: Answer = field(default_factory=Answer)  # counts of the latest stream(), filled when it ends

    @classmethod
    def load(
        cls,
        encoder: Encoder,
        adapter_dir: str | None = None,
        *,
        torch_dtype: str | None = None,
        exact_dtype: bool = True,
        attn_impl: str | None = None,
        use_gpu: bool | None = None,
        model_kwargs: dict[str, Any] | None = None,
    ) -> TransformersEngine:
        """Load the model of ``encoder.model_dir``, and the adapter of ``adapter_dir`` on it.

        ``torch_dtype`` None is the model's own; without ``exact_dtype`` a bfloat16 that comes from the checkpoint's
        args.json gives way on a device that is slow in it (see :func:`resolve_dtype`). ``use_gpu`` None takes GPUs when
        there are any; a model goes over all visible ones if there are several. On CPU all cores that this process may
        use compute.
        """
        import torch

        on_gpu = torch.cuda.is_available() if use_gpu is None else use_gpu
        if on_gpu and not torch.cuda.is_available():
            raise UserError("--use_gpu true: PyTorch sees no GPU here; leave the flag out or set it to false")
        options = dict(model_kwargs or {})
        spread = on_gpu and torch.cuda.device_count() > 1
        if spread:
            options.setdefault("device_map", "auto")
        if not on_gpu:
            torch.set_num_threads(len(os.sched_getaffinity(0)))
        if not exact_dtype and torch_dtype == "bfloat16" and not supports_bfloat16(on_gpu):
            torch_dtype = None
        model = load_model(
            encoder.model_dir,
            torch_dtype=resolve_dtype(torch_dtype, encoder.model_dir, on_gpu, training=False),
            attn_impl=attn_impl,
            trust_remote_code=encoder.trust_remote_code,
            device=None if spread else "cuda" if on_gpu else "cpu",
            model_kwargs=options,
        )
        if encoder.new_special_tokens:
            add_special_tokens(model, encoder.tokenizer, list(encoder.new_special_tokens))
        if adapter_dir is not None:
            model = load_adapter(model, adapter_dir)
        return cls(model.eval(), encoder, context_length(encoder))

    # --- batches ------------------------------------------------------------------------------------------------

    def generate(
        self, conversations: Sequence[Messages], settings: GenerationSettings, tools: Sequence[Any] | None = None
    ) -> list[Answer]:
        """Answer several conversations in one batch, in their order.

        A conversation that cannot be answered (no prompt, too long, a failure in the model) gets an ``Answer`` with
        ``error``; the others are answered all the same. ``tools``: the tool definitions of each conversation.
        """
        answers = [Answer() for _ in conversations]
        prompts: dict[int, list[int]] = {}
        for index, messages in enumerate(conversations):
            try:
                prompts[index] = self.prompt_ids(messages, tools[index] if tools else None)
            except UserError as error:
                answers[index].error = str(error)
        for index, answer in zip(prompts, self._answer_or_split(list(prompts.values()), settings), strict=True):
            answers[index] = answer
        return answers

    def prompt_ids(self, messages: Messages, tools: Any = None) -> list[int]:
        """Token ids of the prompt; UserError when it leaves no room for an answer."""
        ids = self.encoder.encode_prompt(messages, tools)
        if not ids:
            raise UserError("the prompt is empty")
        if len(ids) >= self.context_length:
            raise UserError(f"the prompt has {len(ids)} tokens, the context holds {self.context_length}")
        return ids

    def _answer_or_split(self, prompts: list[list[int]], settings: GenerationSettings) -> list[Answer]:
        """Answer a batch; when the model fails on it (memory, mostly), halve it until the guilty prompt is alone."""
        if not prompts:
            return []
        try:
            return self._answer(prompts, settings)
        except (RuntimeError, ValueError, IndexError) as error:
            if len(prompts) == 1:
                return [Answer(num_prompt_tokens=len(prompts[0]), error=one_line(error))]
            logger.warning("a batch of %d prompts failed (%s): trying smaller ones", len(prompts), one_line(error))
        half = len(prompts) // 2
        return self._answer_or_split(prompts[:half], settings) + self._answer_or_split(prompts[half:], settings)

    def _answer(self, prompts: list[list[int]], settings: GenerationSettings) -> list[Answer]:
        import torch

        pad, width = self.pad_token_id, max(map(len, prompts))
        ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        recorder = LogprobRecorder(settings.top_logprobs or 0, width) if settings.logprobs else None
        sequences = self._run(ids, mask, settings, recorder=recorder)[:, width:].tolist()
        answers = []
        for row, (prompt, generated) in enumerate(zip(prompts, sequences, strict=True)):
            kept, count = self._without_stop_tokens(generated)
            text = cut_at_stop_word(self.decode(kept), self._text_stop_words(settings))
            logprobs = recorder.content(self.encoder.tokenizer, row, kept) if recorder else None
            answers.append(Answer(self._with_prefix(text), len(prompt), count, logprobs))
        return answers

    def _run(self, ids: Any, mask: Any, settings: GenerationSettings, **extra: Any) -> Any:
        """One call of the model's ``generate``; returns the token ids of prompt and answer."""
        import torch
        from transformers import LogitsProcessorList, StoppingCriteriaList

        stop_words, stopped, recorder = self._text_stop_words(settings), extra.get("stopped"), extra.get("recorder")
        criteria = StoppingCriteriaList()
        if stop_words:
            criteria.append(StopWordCriteria(self.decode, stop_words, ids.shape[1]))
        if stopped is not None:
            criteria.append(StopEventCriteria(stopped))
        with torch.inference_mode():
            sequences = self.model.generate(
                input_ids=ids.to(self.model.device),
                attention_mask=mask.to(self.model.device),
                generation_config=self.generation_config(settings, ids.shape[1]),
                stopping_criteria=criteria,
                logits_processor=LogitsProcessorList([recorder] if recorder else []),
                streamer=extra.get("streamer"),
            )
            if recorder:
                recorder.take_tokens(sequences)
        return sequences

    # --- one conversation, as it is generated -------------------------------------------------------------------

    def stream(self, messages: Messages, settings: GenerationSettings, tools: Any = None) -> Iterator[str]:
        """Answer one conversation; yields the text in pieces while the model generates.

        Closing the iterator (or an exception in the consumer, such as Ctrl-C) stops the model at its next token.
        Beam search and log probabilities cannot be streamed: the answer then comes in one piece.
        """
        import torch

        prompt = self.prompt_ids(messages, tools)
        self.last_stream = Answer(num_prompt_tokens=len(prompt))
        if settings.num_beams > 1:
            self.last_stream = self._answer([prompt], settings)[0]
            yield self.last_stream.text
            return
        tokens, stopped, ids = TokenQueue(), threading.Event(), torch.tensor([prompt])

        def work() -> None:
            try:
                self._run(ids, torch.ones_like(ids), settings, streamer=tokens, stopped=stopped)
                tokens.items.put(None)
            except BaseException as error:
                tokens.items.put(error)

        thread = threading.Thread(target=work, name="generate", daemon=True)
        thread.start()
        try:
            yield from self._texts(tokens.items, settings)
        finally:
            stopped.set()
            thread.join()

    def _texts(self, items: queue.SimpleQueue[Any], settings: GenerationSettings) -> Iterator[str]:
        """Token ids from the generating thread to pieces of text."""
        ends, text = set(self.stop_token_ids), TextStream(self.decode, self._text_stop_words(settings))
        prefix = self._with_prefix("")
        if prefix:
            yield prefix
        while not text.finished:
            item = items.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                break
            self.last_stream.num_generated_tokens += 1
            if item in ends:
                break
            piece = text.add(item)
            if piece:
                yield piece
        rest = text.end()
        if rest:
            yield rest
        self.last_stream.text = prefix + text.emitted

    # --- settings -----------------------------------------------------------------------------------------------

    def generation_config(self, settings: GenerationSettings, prompt_length: int) -> Any:
        """The model's generation config with ``settings`` over it."""

        base = self.model.generation_config
        config = copy.deepcopy(base)
        chosen = {name: getattr(settings, name) for name in ("temperature", "top_k", "top_p")}
        wants_sampling = any(value is not None for value in chosen.values()) or base.do_sample
        config.do_sample = bool(wants_sampling) and settings.temperature != 0
        for name, off in (("temperature", 1.0), ("top_k", 0), ("top_p", 1.0)):
            # "off" instead of Transformers' own default (top_k 50): the other engines do not cut either.
            value = _first(chosen[name], getattr(base, name), off)
            setattr(config, name, max(value, off) if name == "top_k" else value)
            if not config.do_sample:
                setattr(config, name, None)
        room = self.context_length - prompt_length
        config.max_new_tokens, config.max_length = min(settings.max_new_tokens or room, room), None
        config.repetition_penalty = _first(settings.repetition_penalty, base.repetition_penalty)
        config.num_beams = settings.num_beams
        config.eos_token_id, config.pad_token_id = self.stop_token_ids or None, self.pad_token_id
        return config

    @property
    def stop_token_ids(self) -> list[int]:
        """Token ids that end an answer: the template's and the model's."""
        own = self.model.generation_config.eos_token_id
        listed = [] if own is None else [own] if isinstance(own, int) else list(own)
        return list(dict.fromkeys([*self.encoder.eos_token_ids, *listed]))

    @property
    def pad_token_id(self) -> int:
        return _first(*self.stop_token_ids, self.encoder.tokenizer.pad_token_id, 0)

    def _text_stop_words(self, settings: GenerationSettings) -> list[str]:
        """Stop words that are not one token and so have to be looked for in the text."""
        ends = set(self.stop_token_ids)
        convert = self.encoder.tokenizer.convert_tokens_to_ids
        return [word for word in (*self.encoder.stop_words, *settings.stop_words) if word and convert(word) not in ends]

    def _without_stop_tokens(self, ids: list[int]) -> tuple[list[int], int]:
        """The ids before the first stop token, and how many were generated (the stop token counts)."""
        ends = set(self.stop_token_ids)
        end = next((i for i, token in enumerate(ids) if token in ends), None)
        return (ids, len(ids)) if end is None else (ids[:end], end + 1)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of generated ids, special tokens included: a model may have been taught to write them."""
        return self.encoder.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _with_prefix(self, text: str) -> str:
        """The answer as the reader should see it: with the ``--response_prefix`` that stood in the prompt."""
        return (self.encoder.response_prefix or "") + text


def context_length(encoder: Encoder) -> int:
    """Tokens that prompt and answer may have together: ``--max_length``, else the model's positions."""
    config = read_config(encoder.model_dir)
    positions = config.get("max_position_embeddings") or (config.get("text_config") or {}).get(
        "max_position_embeddings"
    )
    limits = [limit for limit in (encoder.max_length, positions) if limit]
    return min(limits) if limits else min(encoder.tokenizer.model_max_length, 2**20)


def _first(*values: Any) -> Any:
    """The first value that is not None."""
    return next((value for value in values if value is not None), None)


class StopEventCriteria:
    """Stops every row once an event is set (from another thread)."""

    def __init__(self, event: threading.Event) -> None:
        self.event = event

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        import torch

        return torch.full((input_ids.shape[0],), self.event.is_set(), dtype=torch.bool, device=input_ids.device)


class StopWordCriteria:
    """Stops a row whose last tokens spell a stop word. The text is cut at the word afterwards."""

    def __init__(self, decode: Any, stop_words: list[str], prompt_length: int) -> None:
        self.decode, self.stop_words, self.prompt_length = decode, stop_words, prompt_length
        # A token spells at least one byte, so this many tokens cover the longest word and what precedes it.
        self.window = max(len(word.encode()) for word in stop_words) + 1

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        import torch

        tails = input_ids[:, max(self.prompt_length, input_ids.shape[1] - self.window) :].tolist()
        found = [any(word in self.decode(tail) for word in self.stop_words) for tail in tails]
        return torch.tensor(found, dtype=torch.bool, device=input_ids.device)


class LogprobRecorder:
    """A logits processor that changes nothing and notes the log probability of each token that gets chosen.

    It keeps the scores of one step only: those of step t are read at step t+1, when the choice is known.
    """

    def __init__(self, top: int, prompt_length: int) -> None:
        self.top, self.prompt_length = top, prompt_length
        self.steps: list[tuple[list[float], list[list[float]], list[list[int]]]] = []
        self._last: Any = None

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        self.take_tokens(input_ids)
        self._last = scores.float().log_softmax(-1)
        return scores

    def take_tokens(self, input_ids: Any) -> None:
        """Note the log probabilities of the tokens that the previous step chose, the last column of ``input_ids``."""
        if self._last is None:
            return
        chosen = self._last.gather(1, input_ids[:, self.prompt_length + len(self.steps)][:, None])[:, 0]
        top = self._last.topk(self.top, dim=-1) if self.top else None
        self.steps.append((chosen.tolist(), top.values.tolist() if top else [], top.indices.tolist() if top else []))
        self._last = None

    def content(self, tokenizer: Any, row: int, ids: list[int]) -> dict[str, Any]:
        """OpenAI's ``logprobs`` object for the generated ``ids`` of one row."""

        def entry(token: int, logprob: float) -> dict[str, Any]:
            text = tokenizer.decode([token])
            return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(text.encode())}

        content = []
        for token, (chosen, values, indices) in zip(ids, self.steps, strict=False):
            likely = [entry(i, v) for i, v in zip(indices[row], values[row], strict=True)] if indices else []
            content.append(entry(token, chosen[row]) | {"top_logprobs": likely})
        return {"content": content}
