"""--quant_method on a tiny model: each method's result loads again and computes nearly the same, or is refused."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from rayswift.arguments import make_arguments
from rayswift.cluster import Cluster
from rayswift.errors import UserError
from rayswift.exporting import export, quantizers
from rayswift.exporting.quantize import check_quantizable, suffix, task_options

IDS = torch.arange(3, 40)[None]


def installed(*modules: str) -> bool:
    return all(importlib.util.find_spec(module) for module in modules)


@pytest.fixture
def model_dir(tmp_path: Path) -> str:
    """A tiny Llama whose rows groups of 64 divide, as the numbers of its rows do (AWQ)."""
    from tiny_models import llama, word_tokenizer

    folder = tmp_path / "tiny"
    llama(hidden_size=128, intermediate_size=192).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def rows(tmp_path: Path) -> str:
    path = tmp_path / "rows.jsonl"
    words = [" ".join(f"w{3 + (start * 7 + i * 5) % 150}" for i in range(30)) for start in range(24)]
    path.write_text("".join(json.dumps({"query": text, "response": text}) + "\n" for text in words))
    return str(path)


def logits(folder: str) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model.eval()(IDS).logits.float()


def relative_error(folder: str, model_dir: str) -> float:
    expected = logits(model_dir)
    return float((logits(folder) - expected).norm() / expected.norm())


@pytest.mark.skipif(not installed("compressed_tensors"), reason="compressed-tensors is not installed")
@pytest.mark.parametrize(
    ("method", "dtype", "error"), [pytest.param("int8", "I8", 0.03, marks=pytest.mark.slow), ("fp8", "F8_E4M3", 0.1)]
)
def test_eight_bit_weights_are_stored_in_eight_bits_and_load_again(
    ray_cluster: None, model_dir: str, method: str, dtype: str, error: float
) -> None:
    from rayswift.modeling.loading import read_safetensors_header

    folder = export(make_arguments("export", model=model_dir, quant_method=method))
    assert folder == f"{model_dir}-{method}"
    header = read_safetensors_header(Path(folder) / "model.safetensors")
    assert header["model.layers.0.mlp.up_proj.weight"]["dtype"] == dtype
    assert header["model.embed_tokens.weight"]["dtype"] == "F32"
    names = {path.name for path in Path(folder).iterdir()}
    assert {"config.json", "tokenizer.json", "chat_template.jinja", "generation_config.json"} <= names
    assert 0 < relative_error(folder, model_dir) < error
    with pytest.raises(UserError, match="is quantised already"):
        export(make_arguments("export", model=folder, quant_method=method))


@pytest.mark.skipif(not installed("gptqmodel", "optimum"), reason="the extra quant is not installed")
@pytest.mark.parametrize(("method", "bits", "error"), [("gptq", 4, 0.2), ("gptq", 8, 0.02), ("awq", 4, 0.2)])
def test_calibrated_methods_write_models_that_load_again(
    ray_cluster: None, model_dir: str, rows: str, method: str, bits: int, error: float
) -> None:
    given = {"quant_method": method, "quant_bits": bits, "dataset": [rows], "quant_n_samples": 16, "group_size": 32}
    folder = export(make_arguments("export", model=model_dir, **given))
    assert folder == f"{model_dir}-{method}-int{bits}"
    config = json.loads((Path(folder) / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["bits"], config["group_size"]) == (method, bits, 32)
    assert 0 < relative_error(folder, model_dir) < error


def test_calibration_rows_for_awq_are_joined_and_cut_anew() -> None:
    rows = [np.arange(300), np.arange(300, 1000), np.arange(1000, 1030)]
    made = quantizers.rows_of_one_length(rows)
    assert [len(row) for row in made] == [512, 512]
    assert np.concatenate(made).tolist() == list(range(1024))
    assert [row.tolist() for row in quantizers.rows_of_one_length(rows[2:])] == [list(range(1000, 1030))]


@pytest.mark.skipif(not installed("bitsandbytes"), reason="the extra quant is not installed")
@pytest.mark.parametrize(("bits", "error"), [(4, 0.2), (8, 0.1)])
def test_bitsandbytes_models_load_again(ray_cluster: None, model_dir: str, bits: int, error: float) -> None:
    folder = export(make_arguments("export", model=model_dir, quant_method="bnb", quant_bits=bits))
    assert folder == f"{model_dir}-bnb-int{bits}"
    assert 0 < relative_error(folder, model_dir) < error


def test_a_missing_library_is_one_line_with_the_extra(model_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantizers, "find_spec", lambda module: None)
    with pytest.raises(UserError, match=r"--quant_method bnb: needs bitsandbytes; pip install 'rayswift\[quant\]'"):
        export(make_arguments("export", model=model_dir, quant_method="bnb"))
    assert not Path(model_dir + "-bnb-int4").exists()


def test_the_group_size_has_to_divide_the_rows(model_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantizers, "find_spec", lambda module: True)
    common: dict[str, Any] = {"model": model_dir, "quant_method": "gptq", "dataset": ["rows.jsonl"]}
    assert check_quantizable(make_arguments("export", **common), model_dir) == 64  # 128 does not divide 192
    assert check_quantizable(make_arguments("export", **common, group_size=-1), model_dir) == -1
    with pytest.raises(UserError, match="--group_size 128: does not divide this model's rows; use 64 or 32 or -1"):
        check_quantizable(make_arguments("export", **common, group_size=128), model_dir)


def test_awq_says_which_models_it_cannot_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tiny_models import llama

    monkeypatch.setattr(quantizers, "find_spec", lambda module: True)
    llama(hidden_size=64, intermediate_size=96).save_pretrained(tmp_path / "narrow")
    args = make_arguments("export", model=str(tmp_path / "narrow"), quant_method="awq", dataset=["rows.jsonl"])
    with pytest.raises(UserError, match="gptq does this model"):
        check_quantizable(args, str(tmp_path / "narrow"))


def test_a_task_that_fails_leaves_no_folder_and_says_so_in_one_line(
    ray_cluster: None, model_dir: str, tmp_path: Path
) -> None:
    weights = Path(model_dir) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(UserError) as caught:
        export(make_arguments("export", model=model_dir, quant_method="int8"))
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_the_task_asks_ray_for_what_the_flags_say(ray_cluster: None) -> None:
    found = Cluster(embedded=True, cpus=3, gpus=0, nodes=1)
    args = SimpleNamespace(use_gpu=None, resources_per_worker={}, node_labels={})
    assert task_options(args, found) == {
        "num_cpus": 3.0, "num_gpus": 0.0, "resources": {}, "max_retries": 0, "label_selector": {},
    }  # fmt: skip
    args.resources_per_worker = {"CPU": 2}
    assert task_options(args, found)["num_cpus"] == 2.0
    args.resources_per_worker = {"big_memory": 1}
    with pytest.raises(UserError, match="no node has that"):
        task_options(args, found)
    with pytest.raises(UserError, match="--use_gpu true"):
        task_options(SimpleNamespace(use_gpu=True, resources_per_worker={}, node_labels={}), found)


def test_the_task_runs_on_nodes_with_the_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"Alive": True, "Resources": {"CPU": 2.0}, "Labels": {"zone": "a"}}
    large = {"Alive": True, "Resources": {"CPU": 8.0}, "Labels": {"zone": "b"}}
    monkeypatch.setattr("ray.nodes", lambda: [small, large])
    found = Cluster(embedded=False, cpus=10, gpus=0, nodes=2)
    args = SimpleNamespace(use_gpu=None, resources_per_worker={}, node_labels={"zone": "a"})
    options = task_options(args, found)
    assert (options["label_selector"], options["num_cpus"]) == ({"zone": "a"}, 2.0)
    args.node_labels = {"zone": "c"}
    with pytest.raises(UserError, match="--node_labels zone=c: no node here"):
        task_options(args, found)


@pytest.mark.parametrize(
    ("method", "bits", "expected"),
    [
        ("gptq", 4, "-gptq-int4"),
        ("awq", 4, "-awq-int4"),
        ("bnb", 8, "-bnb-int8"),
        ("int8", 8, "-int8"),
        ("fp8", 8, "-fp8"),
    ],
)
def test_results_are_named_as_in_swift(method: str, bits: int, expected: str) -> None:
    assert suffix(SimpleNamespace(quant_method=method, quant_bits=bits)) == expected
