"""Packs hold whole rows, each once, and are nearly full."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayswift.data.tokens.packing import pack


@given(
    lengths=st.lists(st.integers(0, 40), max_size=200), max_length=st.integers(1, 60), window=st.sampled_from([7, 1000])
)
def test_every_row_is_in_one_pack_that_fits(lengths: list[int], max_length: int, window: int) -> None:
    sizes = np.array(lengths, np.int64)
    packs = pack(sizes, max_length, window)
    assert sorted(packs.rows.tolist()) == list(range(len(lengths)))
    for rows in packs:
        assert len(rows) == 1 or sizes[rows].sum() <= max_length
        assert len({row // window for row in rows.tolist()}) == 1
        assert rows.tolist() == sorted(rows.tolist())
    # Packs come in the order of their first row, so that long rows are not all trained first.
    firsts = [rows[0] for rows in packs]
    assert firsts == sorted(firsts)


@pytest.mark.parametrize(
    ("lengths", "max_length"),
    [
        # The length law of alpaca-gpt4-data-zh, and a heavy-tailed one.
        (np.clip(np.random.RandomState(0).normal(172, 94, 48330), 36, 866), 2048),
        (np.clip(np.random.RandomState(1).lognormal(5, 1.2, 100_000), 1, 4096), 4096),
    ],
)
def test_packs_are_nearly_as_few_as_possible(lengths: np.ndarray, max_length: int) -> None:
    sizes = lengths.astype(np.int64)
    assert len(pack(sizes, max_length)) <= 1.002 * -(-int(sizes.sum()) // max_length)


def test_no_rows_make_no_packs() -> None:
    assert len(pack(np.zeros(0, np.int64), 10)) == 0
