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
from rayswift.serve.replica.adapters import AdapterKey, AdapterLoader, AdapterRefused, check_name

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
    keys = [asyncio.run(registry.key_of(name)) for name in names]
    assert [key and key[:2] for key in keys] == [(names[0], names[0]), (names[1], names[1]), ("start", "")]
    assert [AdapterKey.parse(str(key)) for key in keys] == keys
    assert asyncio.run(registry.key_of("two")) is None


def test_no_adapter_has_the_name_of_a_model(root: Path, loader: AdapterLoader) -> None:
    """Under the name of the one it would answer for it, and the other could not be asked."""
    write_adapter(root / "base")
    write_adapter(root / "other")
    registry = AdapterRegistry("base", {}, str(root), SharedState(None, Counters()), ["base", "other"])
    assert asyncio.run(registry.names()) == ["one", "run/checkpoint-10"]
    for name in ("base", "other"):
        assert asyncio.run(registry.key_of(name)) is None
        for replace in (False, True):
            with pytest.raises(AdapterRefused, match="a model is served under that name") as refused:
                asyncio.run(registry.candidate(name, "one", replace=replace))
            assert refused.value.status == 400
    with pytest.raises(AdapterRefused, match="the model itself"):
        loader.fetch(AdapterKey("base", "one"))


@pytest.mark.parametrize("name", ["../root/one", "/etc", "a/../b", "a//b", "", ".hidden", "a b", "a\0", "x" * 201])
def test_names_that_are_paths_elsewhere_are_refused(root: Path, name: str) -> None:
    assert asyncio.run(registry_of({}, str(root)).key_of(name)) is None
    with pytest.raises(AdapterRefused) as refused:
        check_name(name)
    assert refused.value.status == 400


def test_a_client_can_give_an_adapter_below_the_root_a_name(root: Path) -> None:
    registry = registry_of({"start": "/somewhere"}, str(root))

    def tried(name: str, path: str | None, replace: bool = False) -> AdapterKey:
        return asyncio.run(registry.candidate(name, path, replace=replace))

    def named(name: str, path: str | None, replace: bool = False) -> AdapterKey:
        asyncio.run(registry.name(key := tried(name, path, replace), replace=replace))
        return key

    first = named("mine", "run/checkpoint-10")
    assert asyncio.run(registry.key_of("mine")) == first == ("mine", "run/checkpoint-10", first.version)
    assert named("also", str(root / "one"))[:2] == ("also", "one")
    for path, status in (("/etc", 403), ("s3://bucket/x", 403), ("../x", 400), ("nothing", 404), ("", 400)):
        with pytest.raises(AdapterRefused) as refused:
            tried("new", path)
        assert refused.value.status == status, path
    # As vLLM: a name that is taken needs load_inplace, and keeps its meaning until the other one is loaded.
    for name, path in (("mine", "one"), ("mine", "run/checkpoint-10"), ("one", "run/checkpoint-10"), ("start", "one")):
        with pytest.raises(AdapterRefused) as refused:
            tried(name, path)
        assert refused.value.status == 400, name
    assert tried("mine", "one", True).version > first.version
    assert asyncio.run(registry.key_of("mine")) == tried("mine", None) == first
    second = named("mine", "one", True)
    assert asyncio.run(registry.key_of("mine")) == second
    with pytest.raises(AdapterRefused):
        tried("start", None, True)
    assert tried("start", None) == tried("start", "/somewhere") == ("start", "", 0)
    assert asyncio.run(registry.remove(second)) > second.version
    assert asyncio.run(registry.key_of("mine")) is None


def test_without_a_root_nothing_is_loaded_later() -> None:
    with pytest.raises(AdapterRefused) as refused:
        asyncio.run(registry_of({}, None).candidate("new", "one", replace=False))
    assert refused.value.status == 403


def test_a_good_adapter_is_found_and_accepted(root: Path, loader: AdapterLoader) -> None:
    for name, path in (("one", "one"), ("mine", "run/checkpoint-10")):
        assert loader.fetch(AdapterKey(name, path)) == str(root / path)
        loader.check(name, str(root / path))


def test_links_out_of_the_root_are_refused(root: Path, loader: AdapterLoader, tmp_path: Path) -> None:
    outside = write_adapter(tmp_path / "outside")
    (root / "link").symlink_to(outside)
    (root / "half").mkdir()
    (root / "half" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (root / "half" / "adapter_model.safetensors").symlink_to(outside / "adapter_model.safetensors")
    for name in ("link", "half"):
        with pytest.raises(AdapterRefused) as refused:
            loader.fetch(AdapterKey(name, name))
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
    loader.check("pattern", str(root / "pattern"))
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
            loader.check(name, str(root / name))
        assert refused.value.status == 422
        assert says in str(refused.value), name
