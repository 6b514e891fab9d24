"""Every request of the table (``tests/serve/openai_surface.json``) to a deployment of each engine: what it must answer,
and the same from both."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import openai_surface
import pytest
from serving import KEYS, MODEL, Deployment, deployed

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
def answers(smollm2_dir: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[int, Any]]]:
    """What each engine answers to each case, one engine after the other."""
    found = {}
    for engine in ENGINES:
        folder: Path = tmp_path_factory.mktemp(engine)
        flags = ["--infer_backend", engine, "--served_model_name", MODEL, "--api_key", *KEYS]
        with deployed(smollm2_dir, folder, *flags, api_key=KEYS[0]) as server:
            found[engine] = [ask(server, case) for case in openai_surface.CASES]
        (folder / "answers.json").write_text(json.dumps(found[engine]))
    return found


@pytest.mark.parametrize("engine", ENGINES)
def test_a_deployment_answers_as_the_table_says(engine: str, answers: dict[str, list[tuple[int, Any]]]) -> None:
    found = {
        openai_surface.name_of(case): wrong
        for case, (status, value) in zip(openai_surface.CASES, answers[engine], strict=True)
        if (wrong := openai_surface.problems(case, status, value))
    }
    assert not found, json.dumps(found, indent=1, ensure_ascii=False)


def test_both_engines_answer_alike(answers: dict[str, list[tuple[int, Any]]]) -> None:
    """The same status and the same fields, but for what the table explains."""
    differences = {}
    for case, vllm, transformers in zip(openai_surface.CASES, *(answers[engine] for engine in ENGINES), strict=True):
        explained = set(openai_surface.TABLE["explained"]) | set(case.get("differs", {}))
        fields = [openai_surface.fields_of(value) for _, value in (vllm, transformers)]
        found = sorted((fields[0] ^ fields[1]) - explained)
        if vllm[0] != transformers[0] or found:
            differences[openai_surface.name_of(case)] = [vllm[0], transformers[0], found]
    assert not differences, json.dumps(differences, indent=1, ensure_ascii=False)
