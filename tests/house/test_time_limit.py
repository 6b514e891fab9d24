"""The rule that keeps the suite short is kept itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import time_limit

REPOSITORY = Path(__file__).resolve().parents[2]

TESTS = """
import time
import pytest

@pytest.fixture(scope="module")
def shared():
    time.sleep(0.9)

@pytest.fixture
def own():
    time.sleep(0.5)

def test_with_what_others_share(shared): ...
def test_asks_for_it_later(request): request.getfixturevalue("later")
def test_long(own): time.sleep(0.5)
def test_failed(): assert 1 / 0

@pytest.fixture(scope="session")
def later():
    time.sleep(0.9)

@pytest.mark.slow
def test_slow(own): time.sleep(0.5)
"""


@pytest.mark.slow
def test_a_test_that_takes_long_fails_without_the_time_of_what_tests_share(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = slow\n")
    (tmp_path / "free_machine.py").write_text("import os\nos.getloadavg = lambda: (0.1, 0.1, 0.1)\n")
    paths = {"PYTHONPATH": f"{REPOSITORY / 'tests'}{os.pathsep}{tmp_path}", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "free_machine", "-p", "time_limit", "-rf", "test_it.py"],
        cwd=tmp_path, env={**os.environ, **paths, "RAYSWIFT_TEST_SECONDS": "0.8"}, capture_output=True, text=True,
    )  # fmt: skip
    assert "2 failed, 3 passed" in done.stdout, done.stdout
    assert "FAILED test_it.py::test_long" in done.stdout
    assert "test_it.py::test_long took 1." in done.stdout and " s, and a test may take 0.8: " in done.stdout
    assert "ZeroDivisionError" in done.stdout


def test_the_exceptions_are_tests_that_exist() -> None:
    for name, reason in time_limit.LONG.items():
        path, _, function = name.partition("::")
        assert f"def {function}(" in (REPOSITORY / path).read_text(encoding="utf-8"), name
        assert reason
