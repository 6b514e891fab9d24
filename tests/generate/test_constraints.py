"""Grammars: what may come, what is refused, and the limits of white space."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
import torch

from rayswift.generate import constraints
from rayswift.generate.constraints import GrammarCompiler

pytest.importorskip("llguidance")

END = 2


@pytest.fixture(scope="module")
def compiler(smollm2_dir: str) -> GrammarCompiler:
    from transformers import AutoTokenizer

    return GrammarCompiler(AutoTokenizer.from_pretrained(smollm2_dir), 49152, [END])


def walk(compiler: GrammarCompiler, kind: str, value: Any, seed: int = 0) -> str:
    """A text that a model with random scores writes under a constraint."""
    constraint, generated = compiler(kind, value), []
    scores = torch.rand(49160, generator=torch.Generator().manual_seed(seed))  # more than the tokenizer has
    while len(generated) < 200:
        token = int(constraint.allow(generated, scores).argmax())
        if token == END:
            return str(compiler._tokenizer.decode(generated))
        generated.append(token)
    raise AssertionError(f"no end: {compiler._tokenizer.decode(generated)}")


SCHEMA = {
    "type": "object",
    "properties": {"n": {"enum": [1, 2]}, "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2}},
    "required": ["n", "tags"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("seed", range(3))
def test_a_model_of_noise_writes_what_the_grammar_allows(compiler: GrammarCompiler, seed: int) -> None:
    found = json.loads(walk(compiler, "json", SCHEMA, seed))
    assert found["n"] in (1, 2) and set(found["tags"]) <= {"a", "b"} and len(found["tags"]) <= 2
    assert json.loads(walk(compiler, "json", json.dumps(SCHEMA), seed))["n"] in (1, 2)
    assert walk(compiler, "choice", ['rö"d', "green\n"], seed) in ('rö"d', "green\n")
    assert walk(compiler, "grammar", 'root ::= "yes" | "no"', seed) in ("yes", "no")
    assert walk(compiler, "grammar", 'start: "yes" | "no"', seed) in ("yes", "no")
    number = walk(compiler, "regex", r"\d{3}-\d{4}", seed)
    assert len(number) == 8 and number[3] == "-"


def test_tokens_of_other_replicas_are_taken_up(compiler: GrammarCompiler) -> None:
    """A row that goes on elsewhere asks for the first time when it has tokens already."""
    constraint, scores = compiler("regex", "[ab]{3}"), torch.zeros(49152)
    ids = compiler._tokenizer.encode("ab", add_special_tokens=False)
    allowed = [i for i, score in enumerate(constraint.allow(ids, scores).tolist()) if score == 0.0]
    assert sorted(compiler._tokenizer.decode([token]) for token in allowed) == ["a", "b"]


@pytest.mark.parametrize(
    ("kind", "value"),
    [("json", {"type": "nonsense"}), ("json", {"$ref": "#/nowhere"}), ("json", "{"), ("regex", "(((("),
     ("grammar", "%%%"), ("regex", "(?=a)b")],
)  # fmt: skip
def test_what_is_no_grammar_is_refused_with_a_reason(compiler: GrammarCompiler, kind: str, value: Any) -> None:
    with pytest.raises(ValueError) as refused:  # noqa: PT011  # the words are the library's
        compiler(kind, value)
    assert refused.value.args[0] and "\n" not in str(refused.value)


def test_rules_that_are_not_known_are_left_out(compiler: GrammarCompiler) -> None:
    schema = {"type": "array", "items": {"enum": [1, 2]}, "uniqueItems": True, "minItems": 1, "maxItems": 2}
    assert set(json.loads(walk(compiler, "json", schema))) <= {1, 2}


def test_no_schema_and_no_expression_takes_long(compiler: GrammarCompiler) -> None:
    compiler("regex", "a")
    deep: Any = {"type": "string"}
    for _ in range(60):
        deep = {"type": "object", "properties": {"a": deep}}
    wide = {"type": "object", "properties": {f"p{number}": {"type": "string"} for number in range(1000)}}
    start = time.monotonic()
    for kind, value in (("json", deep), ("json", wide), ("regex", "(a{1,500}){1,500}"), ("regex", "(a+)+$")):
        compiler(kind, value).allow([], torch.zeros(49152))
    assert time.monotonic() - start < 5


def test_without_the_library_the_message_says_what_to_install(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ValueError, match="pip install llguidance") as refused:
        compiler("regex", "a")
    assert str(refused.value) == constraints.MISSING
