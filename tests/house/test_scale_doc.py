"""docs/scale.md is what its script computes."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "scale_doc.py"


@pytest.fixture(scope="module")
def tool() -> dict[str, Any]:
    return runpy.run_path(str(TOOL))


def test_the_page_is_up_to_date(tool: dict[str, Any]) -> None:
    assert tool["PAGE"].read_text(encoding="utf-8") == tool["page"](), "run: python tools/scale_doc.py"


def test_the_model_is_qwen25_7b(tool: dict[str, Any]) -> None:
    assert tool["QWEN25"].parameters == 7_615_616_512  # as Transformers counts


def test_memory_is_deepspeeds_estimate_and_fits(tool: dict[str, Any]) -> None:
    parameters = tool["QWEN25"].parameters
    for cards in (8, 32, 128):
        expected = (2 * parameters + 18 * parameters / cards) / 2**30  # estimate_zero2_model_states_mem_needs
        assert tool["QWEN25"].states_gib("zero2", cards) == pytest.approx(expected, rel=1e-6)
    assert tool["QWEN25"].card_gib(2, 8, 4 * 4096) < tool["CARD"]
    for tokens, published in tool["PUBLISHED"].items():
        assert tool["QWEN1"].card_gib(3, 2, tokens) * 2**30 / 1e9 == pytest.approx(published, rel=0.1)


def test_more_nodes_are_faster_and_less_than_as_many_times_as_fast(tool: dict[str, Any]) -> None:
    one, four, sixteen = (tool["Run"](nodes, 2) for nodes in (1, 4, 16))
    assert one.rate < four.rate < 4 * one.rate
    assert four.rate < sixteen.rate < 4 * four.rate
    assert tool["Run"](4, 3).sent > four.sent, "ZeRO-3 sends more"
    assert tool["SLOWEST"] < one.rate / 8 < tool["FASTEST"]
