"""What a checkpoint carries so that other programs prompt the model, and stop it, as it was trained."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from rayswift.data.chat.conversation import DropRow
from rayswift.data.chat.families import Template, text_of
from rayswift.data.chat.matching import match_template
from rayswift.data.chat.to_jinja import to_jinja
from rayswift.data.tokens.encoder import Encoder
from rayswift.data.tokens.template_choice import load_template, read_date

logger = logging.getLogger("rayswift.data.tokens.carried_template")

_ASKED, _NEXT = {"role": "user", "content": "q 1"}, {"role": "user", "content": "q 2"}
_ANSWERED = {"role": "assistant", "content": "r 1"}
_PROBES = [
    [_ASKED], [{"role": "system", "content": "s 1"}, _ASKED], [_ASKED, _ANSWERED, _NEXT],
    [_ASKED, {"role": "assistant", "content": "<think>\nt 1\n</think>\n\nr 1"}, _NEXT],
]  # fmt: skip


def carry_template(encoder: Encoder, tokenizer: Any) -> bool:
    """Give ``tokenizer`` the encoder's template as its chat template, where that is another than its own. Whether it
    has the right one now; False for a layout that the text of a chat template cannot say, which is left out."""
    loaded = load_template(encoder)
    template = loaded.template
    if not isinstance(template, Template):
        return True
    own = match_template(encoder.tokenizer, read_date(encoder.template_date))
    if own is not None and own.name == template.name:
        return True
    options = replace(loaded.options, enable_thinking=loaded.prompt_thinking)
    text = to_jinja(template, options)
    if text is None:
        return False
    kept, tokenizer.chat_template = tokenizer.chat_template, text
    for probe in _PROBES[: 4 if template.thinking else 3]:
        try:
            expected = text_of(loaded.render_prompt(probe, None))
        except DropRow:  # no place for a system text
            continue
        if tokenizer.apply_chat_template(probe, tokenize=False, add_generation_prompt=True) != expected:
            logger.debug("%s as Jinja lays %s out otherwise", template.name, probe)
            tokenizer.chat_template = kept
            return False
    return True


def carry_ends(encoder: Encoder, generation_config: Any) -> None:
    """Let generation stop where trained replies end, beside where it stops already."""
    own = generation_config.eos_token_id
    known = [] if own is None else [own] if isinstance(own, int) else list(own)
    if absent := [number for number in encoder.eos_token_ids if number not in known]:
        generation_config.eos_token_id = [*known, *absent]
