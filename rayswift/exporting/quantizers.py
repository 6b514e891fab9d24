"""The quantisation methods, each through the library that maintains it; they run in a Ray task.

gptq, awq: GPTQModel, calibrated. int8, fp8: compressed-tensors, the format of llm-compressor, vLLM and Transformers:
weights rounded per row, activations per token while the model runs, so nothing is calibrated. bnb: bitsandbytes.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from rayswift.errors import UserError

if TYPE_CHECKING:
    import numpy as np

#: Method -> module and distribution it needs. Transformers reads GPTQ through optimum.
_NEEDED = {
    "gptq": (("gptqmodel", "gptqmodel"), ("optimum", "optimum")),
    "awq": (("gptqmodel", "gptqmodel"),),
    "bnb": (("bitsandbytes", "bitsandbytes"),),
    "int8": (("compressed_tensors", "compressed-tensors"),),
    "fp8": (("compressed_tensors", "compressed-tensors"),),
}
CALIBRATED = ("gptq", "awq")
#: compressed-tensors' own names for 8-bit weights per row with 8-bit activations per token.
_PRESETS = {"int8": "INT8", "fp8": "FP8_DYNAMIC"}
#: The range of a group's levels is searched for the least error in this norm, as GPTQ's authors do.
_GPTQ_NORM = 2.4
#: Tokens of a calibration row for AWQ, as in AutoAWQ.
_AWQ_LENGTH = 512


@dataclass(frozen=True)
class QuantJob:
    """What a quantisation task needs beside its calibration rows.

    Args:
        sym: GPTQ's levels lie evenly around zero.
        model_dir: local folder of a plain model.
        dtype: dtype of what is not quantised (embeddings, norms, scales).
        device: ``cuda`` or ``cpu``.
    """

    method: str
    bits: int
    group_size: int
    sym: bool
    model_dir: str
    dtype: str
    device: str
    batch_size: int
    max_shard_size: str
    trust_remote_code: bool


def check_libraries(method: str) -> None:
    """Raises UserError, which names the extra, if the method's library is not installed."""
    missing = [name for module, name in _NEEDED[method] if find_spec(module) is None]
    if missing:
        raise UserError(f"--quant_method {method}: needs {' and '.join(missing)}; pip install 'rayswift[quant]'")


def run_job(job: QuantJob, rows: list[np.ndarray], folder: str) -> None:
    """Write the quantised model to ``folder``: config, weights, no tokenizer."""
    if job.method in CALIBRATED:
        _gptqmodel(job, rows, folder)
    elif job.method in _PRESETS:
        _compressed_tensors(job, folder)
    else:
        _bitsandbytes(job, folder)


def _gptqmodel(job: QuantJob, rows: list[np.ndarray], folder: str) -> None:
    import torch

    if job.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # GPTQModel 7.6 takes half of the CPUs and refuses to work with fewer than two.
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(max(2, (os.cpu_count() or 1) // 2)))
    from gptqmodel import BACKEND, GPTQModel
    from gptqmodel.quantization import AWQConfig, GPTQConfig

    # On a CPU nothing is gained by moving layers to disk, and what lies there can not be cast at the end.
    shared = {"bits": job.bits, "group_size": job.group_size, "offload_to_disk": job.device != "cpu"}
    if job.method == "awq":
        config = AWQConfig(**shared, sym=False)  # zero points, as AutoAWQ writes them and vLLM reads them
    else:
        config = GPTQConfig(**shared, sym=job.sym, mse=_GPTQ_NORM)
    # On a CPU the calibration computes in float32: half precision is emulated on most, and slower by far.
    # But GPTQModel packs AWQ weights in half precision only.
    dtype = getattr(torch, job.dtype)
    if job.device == "cpu":
        dtype = torch.bfloat16 if job.method == "awq" else torch.float32
    model = GPTQModel.load(
        job.model_dir, config, device=job.device, dtype=dtype, trust_remote_code=job.trust_remote_code
    )
    if job.method == "awq":
        rows = rows_of_one_length(rows)
    samples = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in rows]
    # Left alone, GPTQModel packs AWQ weights with a CUDA kernel on every device.
    on_cpu = job.method == "awq" and job.device == "cpu"
    model.quantize(samples, batch_size=job.batch_size, backend=BACKEND.AWQ_TORCH if on_cpu else BACKEND.AUTO)
    if job.device == "cpu":  # embeddings and norms; scales keep the dtype that GPTQModel gave them
        for parameter in model.model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(getattr(torch, job.dtype))
    model.save(folder, max_shard_size=job.max_shard_size)


def rows_of_one_length(rows: list[np.ndarray]) -> list[np.ndarray]:
    """Calibration rows joined and cut anew, as AutoAWQ does; what is left over at the end is dropped.

    Of rows of different lengths GPTQModel's AWQ keeps the last batch alone, and rounds plainly where that is short.
    """
    import numpy as np

    tokens = np.concatenate(rows)
    length = min(_AWQ_LENGTH, len(tokens))
    return list(tokens[: len(tokens) // length * length].reshape(-1, length))


def _compressed_tensors(job: QuantJob, folder: str) -> None:
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config, preset_name_to_scheme
    from compressed_tensors.quantization.utils import calculate_qparams, is_module_quantized

    from rayswift.modeling.loading import load_model

    model = load_model(job.model_dir, torch_dtype=job.dtype, device=job.device, trust_remote_code=job.trust_remote_code)
    head = model.get_output_embeddings()
    ignored = [name for name, module in model.named_modules() if module is head]
    scheme = preset_name_to_scheme(_PRESETS[job.method], ["Linear"])
    apply_quantization_config(model, QuantizationConfig(config_groups={"group_0": scheme}, ignore=ignored))
    for module in model.modules():
        if is_module_quantized(module):
            weight = module.weight.float()
            scale, _ = calculate_qparams(
                weight.amin(dim=1, keepdim=True), weight.amax(dim=1, keepdim=True), scheme.weights
            )
            module.weight_scale.data.copy_(scale)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder, max_shard_size=job.max_shard_size)
    compressor.update_config(folder)


def _bitsandbytes(job: QuantJob, folder: str) -> None:
    import torch
    from transformers import BitsAndBytesConfig

    from rayswift.modeling.loading import load_model

    settings: dict[str, Any] = {"load_in_8bit": True}
    if job.bits == 4:  # SWIFT's defaults
        settings = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": getattr(torch, job.dtype),
        }
    keywords = {"quantization_config": BitsAndBytesConfig(**settings), "device_map": {"": job.device}}
    model = load_model(
        job.model_dir, torch_dtype=job.dtype, trust_remote_code=job.trust_remote_code, model_kwargs=keywords
    )
    model.save_pretrained(folder, max_shard_size=job.max_shard_size)
