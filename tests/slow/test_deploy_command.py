"""``rayswift deploy`` as a user runs it, with the Transformers engine and a Ray of its own.

The same endpoint in this process, with a random model: ``tests/serve/test_deploy.py``. With vLLM: the other files here.
"""

from __future__ import annotations

from pathlib import Path

import openai
import pytest
from serving import beyond_this_machine, deployed, listening

from rayswift.generate.transformers import TransformersEngine
from rayswift.generate.types import SamplingParams

pytestmark = pytest.mark.slow

MODEL, KEY = "SmolLM2-135M-Instruct", "sk-of-this-test"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


def test_it_answers_what_infer_answers_on_ports_of_this_machine_and_ends_by_itself(
    smollm2_dir: str, engine: TransformersEngine, tmp_path: Path
) -> None:
    flags = ["--infer_backend", "transformers", "--use_gpu", "false", "--api_key", KEY, "--max_length", "512"]
    expected = engine.generate([QUESTION], SamplingParams(max_new_tokens=12, temperature=0))[0].text
    with deployed(smollm2_dir, tmp_path, *flags, api_key=KEY) as server:  # leaving it checks that nothing is left
        client = openai.OpenAI(base_url=server.base_url, api_key=KEY, max_retries=0, timeout=120)
        asked = {"model": MODEL, "messages": QUESTION, "max_tokens": 12, "temperature": 0}
        assert client.chat.completions.create(**asked).choices[0].message.content == expected
        pieces = client.chat.completions.create(**asked, stream=True)
        assert "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices) == expected
        found = listening(server.tree())
        assert ("127.0.0.1", server.port) in found
        assert not beyond_this_machine(found)
        assert server.log.read_text().count("ready:") == 1
