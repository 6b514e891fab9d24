"""Templates derived from models' own chat templates, held against the chat templates themselves."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from template_gate import SCENARIOS, measure, save_tokenizer

from rayswift.data.chat.conversation import DropRow
from rayswift.data.tokens.encoder import Dropped, Encoded, Encoder
from rayswift.errors import UserError

TRL = Path(find_spec("trl").submodule_search_locations[0]) / "chat_templates"  # type: ignore[union-attr,index]


@pytest.mark.parametrize("file", sorted(TRL.glob("*.jinja")), ids=lambda file: file.stem)
def test_what_is_trained_is_what_generation_would_write(file: Path, tmp_path: Path) -> None:
    found = measure(file.read_text(encoding="utf-8"), tmp_path)
    assert found == {scenario: [] for scenario in SCENARIOS}
