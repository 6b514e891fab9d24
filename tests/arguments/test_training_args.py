"""training_args.json is what the installed Transformers says. The one test of arguments that imports Transformers."""

from __future__ import annotations

import json
from pathlib import Path

from rayswift.arguments import training_args


def test_the_data_file_is_in_step_with_transformers() -> None:
    held = json.loads(Path(training_args.DATA_FILE).read_text(encoding="utf-8"))
    current = json.loads(json.dumps(training_args.generate()))
    assert held["fields"] == current["fields"], "run: python -m rayswift.arguments.training_args"
