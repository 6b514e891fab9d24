"""Every request of the table (``tests/serve/openai_surface.json``) to a deployment of each engine: what it must answer,
and the same from both."""

from __future__ import annotations

import json
import shutil
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import openai_surface
import pytest
from serving import KEYS, MODEL, Deployment, deployed
from tiny_models import llama

pytestmark = pytest.mark.slow

ENGINES = ("vllm", "transformers")


def ask(server: Deployment, case: dict[str, Any]) -> tuple[int, Any]:
    headers = {"Content-Type": "application/json"}
    if key := case.get("key", KEYS[0]):
        headers["Authorization"] = f"Bearer {key}"
    url, body = server.address + case["path"], openai_surface.body_of(case)
    request = urllib.request.Request(url, body, headers, method=case.get("method", "POST"))
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            status, kind, content = response.status, response.headers["content-type"] or "", response.read()
    except urllib.error.HTTPError as error:
        status, kind, content = error.code, error.headers["content-type"] or "", error.read()
    return status, openai_surface.read(kind, content)


@pytest.fixture(scope="module")
def small_dir(tiny_dir: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny model with heads as wide as vLLM's kernels for CPUs want them: answers cost next to nothing."""
    folder = tmp_path_factory.mktemp("small") / "small-llama"
    shutil.copytree(tiny_dir, folder)
    sizes = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.5}
    llama(vocab_size=49152, max_position_embeddings=2048, **sizes).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def answers(small_dir: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[int, Any]]]:
    """What each engine answers to each case, one engine after the other."""
    found = {}
    for engine in ENGINES:
        folder: Path = tmp_path_factory.mktemp(engine)
        flags = ["--infer_backend", engine, "--served_model_name", MODEL, "--api_key", *KEYS]
        with deployed(small_dir, folder, *flags, api_key=KEYS[0]) as server:
            found[engine] = [ask(server, case) for case in openai_surface.CASES]
        (folder / "answers.json").write_text(json.dumps(found[engine]))
    return found


@pytest.mark.parametrize("engine", ENGINES)
def test_a_deployment_answers_as_the_table_says(engine: str, answers: dict[str, list[tuple[int, Any]]]) -> None:
    found = {
        openai_surface.name_of(case): wrong
        for case, (status, value) in zip(openai_surface.CASES, answers[engine], strict=True)
        if (wrong := openai_surface.problems(openai_surface.of_engine(case, engine), status, value))
    }
    assert not found, json.dumps(found, indent=1, ensure_ascii=False)


def test_both_engines_answer_alike(answers: dict[str, list[tuple[int, Any]]]) -> None:
    """The same status and the same fields, but for what the table explains."""
    differences = {}
    for case, *both in zip(openai_surface.CASES, *(answers[engine] for engine in ENGINES), strict=True):
        if found := openai_surface.differences(case, *both):
            differences[openai_surface.name_of(case)] = found
    assert not differences, json.dumps(differences, indent=1, ensure_ascii=False)
