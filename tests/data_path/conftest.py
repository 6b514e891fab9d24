from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def qwen_dir() -> str:
    """The real Qwen2.5 tokenizer, rebuilt once from its published ranks and kept in `.cache`."""
    spec = importlib.util.spec_from_file_location("qwen_tokenizer", REPOSITORY / "tools" / "qwen_tokenizer.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return str(module.build_qwen_tokenizer(REPOSITORY / ".cache" / "qwen2.5-tokenizer"))


@pytest.fixture(scope="session")
def family_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Folder of a small tokenizer by family name, built on first use."""
    from chat_templates import FAMILIES, save_tokenizer

    built: dict[str, str] = {}

    def directory(name: str) -> str:
        if name not in built:
            built[name] = save_tokenizer(FAMILIES[name], tmp_path_factory.mktemp(name))
        return built[name]

    return directory
