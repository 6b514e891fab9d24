"""``--to_ollama``: a Modelfile with the template, stop words, system text and sampling settings of a model."""

from __future__ import annotations

import json
from pathlib import Path

from rayswift.data.tokens.encoder import Encoder
from rayswift.errors import UserError
from rayswift.exporting.ollama_template import ollama_template
from rayswift.files import parse_json

#: The context is memory that Ollama reserves: what a laptop has left beside a model of some gigabytes.
LAPTOP_CONTEXT = 8192
#: generation_config.json -> Ollama's name.
_PARAMETERS = {
    "temperature": "temperature", "top_k": "top_k", "top_p": "top_p", "repetition_penalty": "repeat_penalty",
    "max_new_tokens": "num_predict",
}  # fmt: skip


def modelfile(encoder: Encoder, weights: str, context: int | None) -> str:
    """The text of a Modelfile.

    Args:
        encoder: the model's tokenizer and template (``--template``, ``--system``).
        weights: what stands after FROM: a GGUF file, or a folder of safetensors.
        context: tokens of context that Ollama reserves memory for; None leaves Ollama's.
    """
    system, template = ollama_template(encoder)
    lines = [f"FROM {weights}", f'TEMPLATE """{template}"""']
    text = encoder.system if encoder.system is not None else system
    # A Modelfile has no way to write them inside a text: what follows would be read as commands.
    for what, words in (("--system", text), ("its template", template)):
        if '"""' in (words or ""):
            raise UserError(f'--to_ollama true: {what} holds """, which ends a text in a Modelfile; write it otherwise')
    if text:
        lines.append(f'SYSTEM """{text}"""')
    stops = [*encoder.stop_words, encoder.tokenizer.eos_token or ""]
    lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in dict.fromkeys(stops) if stop]
    path = Path(encoder.model_dir) / "generation_config.json"
    try:
        config = dict(parse_json(path.read_text(encoding="utf-8"))) if path.is_file() else {}
    except (OSError, TypeError, ValueError):
        config = {}
    lines += [f"PARAMETER {own} {config[name]}" for name, own in _PARAMETERS.items()
              if type(config.get(name)) in (int, float)]  # fmt: skip
    if context:
        lines.append(f"PARAMETER num_ctx {context}")
    return "\n".join(lines) + "\n"
