"""The table of OpenAI's surface without a deployment: its requests to the Transformers engine's app, over a tiny model.

What the gateway answers by itself, and whether vLLM answers alike, is asked of deployments (``tests/slow``).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai_surface
import pytest
from starlette.testclient import TestClient

from rayswift.data.tokens.encoder import Encoder
from rayswift.generate.transformers import TransformersEngine
from rayswift.serve.replica.transformers import TransformersServing

OF_THE_ENGINE = [case for case in openai_surface.CASES if not case.get("gateway")]


@pytest.fixture(scope="module")
def http(tiny_dir: str) -> Iterator[TestClient]:
    engine = TransformersEngine.load(Encoder(tiny_dir), torch_dtype="float32", use_gpu=False)
    serving = TransformersServing(engine, "small")
    yield TestClient(serving.app, raise_server_exceptions=False)
    serving.runner.close()


@pytest.mark.parametrize("case", OF_THE_ENGINE, ids=openai_surface.name_of)
def test_the_transformers_engine_answers_as_the_table_says(case: dict[str, Any], http: TestClient) -> None:
    pytest.importorskip("llguidance")
    body, headers = openai_surface.body_of(case), {"content-type": "application/json"}
    response = http.request(case.get("method", "POST"), case["path"], content=body, headers=headers)
    value = openai_surface.read(response.headers.get("content-type", ""), response.content)
    problems = openai_surface.problems(openai_surface.of_engine(case, "transformers"), response.status_code, value)
    assert not problems, problems


def test_no_two_cases_have_the_same_name() -> None:
    names = [openai_surface.name_of(case) for case in openai_surface.CASES]
    assert len(names) == len(set(names)) > 200
