"""Fixtures that several test packages share."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def smollm2_dir() -> str:
    """A real small chat model, SmolLM2-135M-Instruct in bf16: made once by tools/smollm2.py, then found there."""
    spec = importlib.util.spec_from_file_location("smollm2", REPOSITORY / "tools" / "smollm2.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.smollm2()
