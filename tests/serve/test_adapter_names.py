"""Adapters by name: what a client may ask for, and what is refused."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from rayswift.generate.model_spec import ModelSpec
from rayswift.serve.gateway.adapters import AdapterRegistry
from rayswift.serve.gateway.shared import Counters, SharedState
from rayswift.serve.replica.adapters import AdapterLoader, AdapterRefused, check_name

HIDDEN = 8
TARGET = "model.layers.0.self_attn.q_proj"


def write_adapter(folder: Path, *, rank: int = 4, hidden: int = HIDDEN, **config: object) -> Path:
    """A LoRA of one layer."""
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": rank, **config}))
    tensors = {
        f"base_model.model.{TARGET}.lora_A.weight": np.zeros((rank, hidden), np.float32),
        f"base_model.model.{TARGET}.lora_B.weight": np.zeros((hidden, rank), np.float32),
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def registry_of(start: dict[str, str], root: str | None) -> AdapterRegistry:
    """The names of a gateway that is alone."""
    return AdapterRegistry("m", start, root, SharedState(None, Counters()))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_adapter(tmp_path / "root" / "one")
    write_adapter(tmp_path / "root" / "run" / "checkpoint-10")
    return tmp_path / "root"


@pytest.fixture
def loader(root: Path, tmp_path: Path) -> AdapterLoader:
    base = tmp_path / "base"
    base.mkdir()
    save_file({f"{TARGET}.weight": np.zeros((HIDDEN, HIDDEN), np.float32)}, base / "model.safetensors")
    loader = AdapterLoader(ModelSpec("base", str(base), "vllm", adapter_root=str(root), max_lora_rank=16))
    loader.read_base(str(base))
    return loader


def test_every_adapter_below_the_root_can_be_asked_for(root: Path) -> None:
    registry = registry_of({"start": "/somewhere"}, str(root))
    names = asyncio.run(registry.names())
    assert names == ["one", "run/checkpoint-10", "start"]
    assert [asyncio.run(registry.key_of(name)) for name in names] == names
    assert asyncio.run(registry.key_of("two")) is None


@pytest.mark.parametrize("name", ["../root/one", "/etc", "a/../b", "a//b", "", ".hidden", "a b", "a\0", "x" * 201])
def test_names_that_are_paths_elsewhere_are_refused(root: Path, name: str) -> None:
    assert asyncio.run(registry_of({}, str(root)).key_of(name)) is None
    with pytest.raises(AdapterRefused) as refused:
        check_name(name)
    assert refused.value.status == 400


def test_a_client_can_give_an_adapter_below_the_root_a_name(root: Path) -> None:
    registry = registry_of({"start": "/somewhere"}, str(root))
    assert asyncio.run(registry.add("mine", "run/checkpoint-10")) == "mine=run/checkpoint-10"
    assert asyncio.run(registry.key_of("mine")) == "mine=run/checkpoint-10"
    assert asyncio.run(registry.add("also", str(root / "one"))) == "also=one"
    for path, status in (("/etc", 403), ("s3://bucket/x", 403), ("../x", 400), ("nothing", 404), ("", 400)):
        with pytest.raises(AdapterRefused) as refused:
            asyncio.run(registry.add("new", path))
        assert refused.value.status == status, path
    with pytest.raises(AdapterRefused):
        asyncio.run(registry.add("start", "one"))
    asyncio.run(registry.remove("mine"))
    assert asyncio.run(registry.key_of("mine")) is None


def test_without_a_root_nothing_is_loaded_later() -> None:
    with pytest.raises(AdapterRefused) as refused:
        asyncio.run(registry_of({}, None).add("new", "one"))
    assert refused.value.status == 403


def test_a_good_adapter_is_found_and_accepted(root: Path, loader: AdapterLoader) -> None:
    for key, folder in (("one", root / "one"), ("mine=run/checkpoint-10", root / "run" / "checkpoint-10")):
        assert loader.fetch(key) == str(folder)
        loader.check(key, str(folder))


def test_links_out_of_the_root_are_refused(root: Path, loader: AdapterLoader, tmp_path: Path) -> None:
    outside = write_adapter(tmp_path / "outside")
    (root / "link").symlink_to(outside)
    (root / "half").mkdir()
    (root / "half" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (root / "half" / "adapter_model.safetensors").symlink_to(outside / "adapter_model.safetensors")
    for name in ("link", "half"):
        with pytest.raises(AdapterRefused) as refused:
            loader.fetch(name)
        assert refused.value.status == 403


def test_what_the_engine_cannot_use_is_refused_with_the_reason(root: Path, loader: AdapterLoader) -> None:
    write_adapter(root / "huge", rank=32)
    write_adapter(root / "other", hidden=HIDDEN * 2)
    write_adapter(root / "dora", use_dora=True)
    write_adapter(root / "pissa", init_lora_weights="pissa")
    write_adapter(root / "niter", init_lora_weights="pissa_niter_16")
    write_adapter(root / "biases", bias="all")
    write_adapter(root / "ia3", peft_type="IA3")
    write_adapter(root / "less", r=2)
    write_adapter(root / "text", r="many")
    write_adapter(root / "number", target_modules=5)
    write_adapter(root / "broken-pattern", target_modules="(")
    write_adapter(root / "patterns-list", rank_pattern=["q_proj"])
    write_adapter(root / "elsewhere", target_modules=["no_such_module"])
    write_adapter(root / "pattern", r=2, rank_pattern={TARGET: 4}, target_modules=[TARGET.rpartition(".")[2]])
    loader.check("pattern", loader.fetch("pattern"))
    pickle = write_adapter(root / "pickle")
    (pickle / "adapter_model.safetensors").rename(pickle / "adapter_model.bin")
    cut = write_adapter(root / "cut") / "adapter_model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-8])
    for name, says in (
        ("huge", "rank 32 is above the server's 16"),
        ("other", "another base model"),
        ("dora", "merge it"),
        ("pissa", "changes the base"),
        ("niter", "no model fits it"),
        ("biases", "has biases"),
        ("ia3", "only LoRA"),
        ("less", "says rank 2, its weights have 4"),
        ("text", "r is 'many'"),
        ("elsewhere", "target_modules"),
        ("number", "target_modules is a list"),
        ("broken-pattern", "target_modules is a list"),
        ("patterns-list", "rank_pattern"),
        ("pickle", "pickle"),
        ("cut", "broken or incomplete"),
    ):
        with pytest.raises(AdapterRefused) as refused:
            loader.check(name, loader.fetch(name))
        assert refused.value.status == 422
        assert says in str(refused.value), name
