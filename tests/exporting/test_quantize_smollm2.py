"""SmolLM2 quantised on this machine: each result is loaded by Transformers (and served by vLLM where it has the
format), and its perplexity on English and Chinese text stands beside the original's."""

from __future__ import annotations

import functools
import gzip
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from rayswift.modeling.loading import supports_bfloat16

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[2]
SHARED = REPOSITORY.parent / "shared" / "data"
PERPLEXITY = Path(__file__).with_name("perplexity.py")
NF4 = pytest.mark.xfail(reason="so small a model loses 30 % (English) and 44 % (Chinese) with NF4", strict=True)
#: Without bfloat16 instructions AWQ takes four minutes for each of the 30 layers.
BFLOAT16 = pytest.mark.skipif(not supports_bfloat16(use_gpu=False), reason="AWQ needs bfloat16 on CPUs")
METHODS = [
    "gptq-4",
    "gptq-8",
    pytest.param("awq-4", marks=BFLOAT16),
    "int8-8",
    "fp8-8",
    pytest.param("bnb-4", marks=NF4),
    "bnb-8",
]
#: On CPUs vLLM multiplies packed weights with AVX-512 only; GPTQ weights off zero, as gptq-4 has them here, nowhere.
AVX512 = pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() == "AVX2", reason="vLLM needs AVX-512 for it")
SERVED = [pytest.param("awq-4", marks=AVX512), "int8-8", "fp8-8"]
#: What those that are calibrated are given, beside the rows: plain text, as it is measured on; a quarter of an hour on
#: two cores.
CALIBRATION = [
    "--use_chat_template", "false", "--quant_n_samples", "128", "--max_length", "512", "--group_size", "32",
]  # fmt: skip
FINER = {"gptq-4": ["--quant_sym", "false"]}
MODULES = {"gptq": "gptqmodel", "awq": "gptqmodel", "bnb": "bitsandbytes"}


@functools.cache
def documents() -> dict[str, list[str]]:
    """English and Chinese texts; Chinese where the project's shared data lies beside the checkout."""
    with gzip.open(REPOSITORY / "tests/data/pretrain_en.jsonl.gz", "rt") as file:
        english = [next(iter(json.loads(line).values())) for line in file]
    if not SHARED.is_dir():
        return {"english": [str(text) for text in english]}
    lines = (SHARED / "pretrain/c4_demo.jsonl").read_text().splitlines()
    chinese = json.loads((SHARED / "sft/alpaca_zh_demo.json").read_text())
    return {"english": [json.loads(line)["text"] for line in lines], "chinese": [row["output"] for row in chinese]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts to measure on, and calibration rows from other documents."""
    root = tmp_path_factory.mktemp("quantised")
    texts = {name: "\n".join(found[: len(found) // 3]) for name, found in documents().items()}
    (root / "texts.json").write_text(json.dumps(texts))
    rows = [text[:1500] for found in documents().values() for text in found[-150:] if len(text) > 60]
    lines = [json.dumps({"messages": [{"role": "assistant", "content": text}]}) for text in rows]
    (root / "rows.jsonl").write_text("\n".join(lines) + "\n")
    return root


def measured(engine: str, folder: Path, *models: str) -> list[dict[str, Any]]:
    command = [sys.executable, str(PERPLEXITY), engine, str(folder / "texts.json"), *models]
    done = subprocess.run(command, text=True, capture_output=True, timeout=540)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.fixture(scope="module")
def original(smollm2_dir: str, folder: Path) -> dict[str, Any]:
    (found,) = measured("transformers", folder, smollm2_dir)
    print("\noriginal", found)
    return found


def quantised(method: str, smollm2_dir: str, folder: Path) -> str:
    """The folder with the model that `rayswift export` made; made once."""
    name, bits = method.split("-")
    if name in MODULES and importlib.util.find_spec(MODULES[name]) is None:
        pytest.skip("the extra quant is not installed")
    target = folder / method
    if not target.exists():
        words = ["--model", smollm2_dir, "--quant_method", name, "--quant_bits", bits, "--output_dir", str(target)]
        if name in ("gptq", "awq"):
            words += ["--dataset", str(folder / "rows.jsonl"), *CALIBRATION, *FINER.get(method, [])]
        command = [sys.executable, "-m", "rayswift", "export", *words]
        done = subprocess.run(command, text=True, capture_output=True, timeout=1800, cwd=folder)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return str(target)


def assert_close(found: dict[str, Any], original: dict[str, Any]) -> None:
    ratios = {name: found[name] / original[name] for name in documents()}
    print("\n", found, {name: f"{ratio - 1:+.1%}" for name, ratio in ratios.items()})
    assert all(0.8 < ratio < 1.15 for ratio in ratios.values()), ratios


@pytest.mark.parametrize("method", METHODS)
def test_perplexity_in_transformers_rises_by_less_than_15_per_cent(
    method: str, smollm2_dir: str, folder: Path, original: dict[str, Any]
) -> None:
    made = quantised(method, smollm2_dir, folder)
    (found,) = measured("transformers", folder, made)
    assert_close(found, original)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
@pytest.mark.parametrize("method", SERVED)
def test_vllm_serves_it_with_the_same_perplexity(
    method: str, smollm2_dir: str, folder: Path, original: dict[str, Any]
) -> None:
    (found,) = measured("vllm", folder, quantised(method, smollm2_dir, folder))
    assert_close(found, original)
    assert found["answer_logprob"] > -1.5


@pytest.mark.parametrize("method", ["gptq-4", "int8-8"])
def test_rayswift_infer_answers_with_a_quantised_model(method: str, smollm2_dir: str, folder: Path) -> None:
    command = [sys.executable, "-m", "rayswift", "infer", "--model", quantised(method, smollm2_dir, folder)]
    asked = {"input": "What is the capital of France?\n", "text": True, "capture_output": True, "timeout": 300}
    done = subprocess.run([*command, "--temperature", "0", "--max_new_tokens", "12"], **asked)
    assert "Paris" in done.stdout, done.stderr[-2000:]


def test_a_gguf_file_of_eight_bits_keeps_the_perplexity(smollm2_dir: str, folder: Path) -> None:
    """Read back by Transformers' own GGUF reader."""
    target = folder / "gguf"
    command = [sys.executable, "-m", "rayswift", "export", "--model", smollm2_dir, "--to_gguf", "q8_0"]
    subprocess.run([*command, "--output_dir", str(target)], check=True, timeout=300)
    (file,) = target.glob("*.gguf")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(smollm2_dir)(documents()["english"][0], return_tensors="pt").input_ids[
        :, :256
    ]
    losses = []
    for where, options in ((smollm2_dir, {}), (str(target), {"gguf_file": file.name})):
        model = AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32, **options).eval()
        with torch.no_grad():
            losses.append(float(model(tokens, labels=tokens).loss))
    print("\nloss of the original and of q8_0:", losses)
    assert losses[1] == pytest.approx(losses[0], abs=0.02)
