"""Go's own ``text/template`` against the renderer of the tests, over the Modelfile of every family.

Needs Go: ``apt-get install golang-go`` (Debian); nothing is downloaded.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from go_template import ollama_render
from ollama_conversations import CLOCK, MODES, ROUNDS, TOOL_CONVERSATIONS, WEATHER, says

from rayswift.data.chat.families import load_templates
from rayswift.data.tokens.encoder import Encoder
from rayswift.exporting.ollama_template import ollama_template

pytestmark = pytest.mark.slow


def test_go_renders_every_modelfile_as_the_renderer_of_the_tests_does(smollm2_dir: str, tmp_path: Path) -> None:
    go = shutil.which("go")
    assert go, "Go is not installed: apt-get update && apt-get install -y golang-go"
    binary = tmp_path / "render"
    source = Path(__file__).with_name("ollama_go") / "main.go"
    subprocess.run([go, "build", "-o", binary, source], check=True, timeout=300)
    jobs, expected = [], []
    for family in load_templates():
        _, template = ollama_template(Encoder(smollm2_dir, template=family))
        plain = [(rounds, []) for rounds in (ROUNDS[:1], ROUNDS, [says("system", "Be kind."), *ROUNDS])]
        for messages, tools in [*plain, *((one, [WEATHER, CLOCK]) for one in TOOL_CONVERSATIONS.values())]:
            for values, _ in MODES:
                asked = [{**m, "ToolCalls": [{"Function": call} for call in m.get("tool_calls", ())]} for m in messages]
                think, is_set = values.get("Think", False), values.get("IsThinkSet", False)
                jobs.append(
                    {"template": template, "messages": asked, "tools": tools, "think": think, "think_set": is_set}
                )
                expected.append(ollama_render(template, messages, tools, **values))
    lines = "".join(json.dumps(job) + "\n" for job in jobs)
    done = subprocess.run([binary], input=lines, capture_output=True, text=True, check=True, timeout=300)
    assert [json.loads(line) for line in done.stdout.splitlines()] == expected
