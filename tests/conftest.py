"""Fixtures that several test packages share."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tests find nothing in the user's token cache, and leave nothing there."""
    os.environ["RAYSWIFT_CACHE"] = str(tmp_path_factory.mktemp("rayswift-cache"))


@pytest.fixture(scope="session")
def smollm2_dir() -> str:
    """A real small chat model, SmolLM2-135M-Instruct in bf16: made once by tools/smollm2.py, then found there."""
    spec = importlib.util.spec_from_file_location("smollm2", REPOSITORY / "tools" / "smollm2.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.smollm2()


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One embedded Ray for the whole session, small enough for a laptop. Asking for it is what starts it."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    ray.init(
        address="local",
        num_cpus=3,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
        object_store_memory=256 * 2**20,
    )
    yield
    ray.shutdown()
