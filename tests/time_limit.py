"""A test that takes long fails, unless it is ``slow`` or :data:`LONG` says why: else the suite grows back.

Its seconds are those of its call and of the fixtures that are made for it alone; what tests share (a model, Ray) counts
for none of them. Where more processes want to run than there are cores, all of them get as much more time. A slow
machine needs a higher limit: ``RAYSWIFT_TEST_SECONDS``, 0 for none. Unset, it is 10 for the whole suite, and none for
a few tests that are run alone: the first of them pays for the imports of all.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any

import pytest

LIMIT = float(os.environ.get("RAYSWIFT_TEST_SECONDS", "10"))
#: More tests than this are the whole suite.
MANY = 1000
#: Tests that may take longer, and why.
LONG = {
    "tests/data_path/test_pipeline.py::test_a_stream_through_ray_data_is_the_plan_exactly": "the first Ray Data job of "
    "a session starts its workers",
    "tests/data_path/test_pipeline.py::test_streams_are_read_side_by_side_by_every_worker_at_its_own_pace": "the first "
    "Ray Data job of a session starts its workers",
    "tests/data_path/test_token_cache.py::test_large_datasets_go_through_ray_data_to_the_same_rows": "the first Ray "
    "Data job of a session starts its workers",
    "tests/exporting/test_quantize.py::test_eight_bit_weights_are_stored_in_eight_bits_and_load_again": "imports "
    "compressed-tensors",
    "tests/generate/test_pool.py::test_a_pool_answers_as_one_engine_does": "an actor imports Transformers",
    "tests/sampling/test_sample_command.py::test_a_pool_answers_every_prompt_so_many_times_and_a_second_run_scores_the_"
    "file": "an actor imports Transformers",
    "tests/sampling/test_sample_command.py::test_a_reward_model_scores_and_one_that_is_none_is_refused_first": "an "
    "actor imports Transformers",
    "tests/train/test_warm_workers.py::test_a_run_begins_in_the_process_that_has_imported": "a worker imports what "
    "training needs",
    "tests/train/test_warm_workers.py::test_a_process_that_died_early_is_replaced_and_ctrl_c_ends_the_run_and_its_"
    "workers": "a worker imports Ray Train",
}

_own = pytest.StashKey[float]()
_shared = 0.0  # seconds since the last report that went into fixtures which tests share


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: Any) -> Iterator[None]:
    """Note how long a fixture takes that is not made for one test."""
    global _shared
    before, began = _shared, time.perf_counter()
    try:
        return (yield)
    finally:
        if fixturedef.scope != "function":
            _shared = before + time.perf_counter() - began


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Let a test fail that passed too late."""
    global _shared
    report: Any = yield
    item.stash[_own] = seconds = item.stash.get(_own, 0.0) + call.duration - _shared
    _shared = 0.0
    limit = LIMIT * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
    is_asked = "RAYSWIFT_TEST_SECONDS" in os.environ or item.session.testscollected > MANY
    allowed = not (LIMIT and is_asked) or item.get_closest_marker("slow") or item.nodeid.partition("[")[0] in LONG
    if call.when == "call" and report.passed and seconds > limit and not allowed:
        report.outcome = "failed"
        report.longrepr = (
            f"{item.nodeid} took {seconds:.1f} s, and a test may take {limit:.3g}: make it faster (a random model, a "
            "command in this process, a stub where the engine is not asked), mark it slow and let .ci/run run it, or "
            "say in tests/time_limit.py why it takes long. On a slow machine: RAYSWIFT_TEST_SECONDS=30."
        )
    return report
