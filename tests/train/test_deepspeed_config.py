"""``--deepspeed``: presets, JSON, files, and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rayswift.errors import UserError
from rayswift.train.deepspeed import check_precision, deepspeed_config, zero_stage


@pytest.mark.parametrize(
    ("preset", "stage", "optimizer_device", "parameter_device"),
    [
        ("zero0", 0, None, None),
        ("zero1", 1, "none", None),
        ("zero2", 2, "none", None),
        ("zero3", 3, "none", "none"),
        ("zero2_offload", 2, "cpu", None),
        ("zero3_offload", 3, "cpu", "cpu"),
    ],
)
def test_presets(preset: str, stage: int, optimizer_device: str | None, parameter_device: str | None) -> None:
    config = deepspeed_config(preset)
    assert config is not None
    assert zero_stage(config) == stage
    zero = config["zero_optimization"]
    assert zero.get("offload_optimizer", {}).get("device") == optimizer_device
    assert zero.get("offload_param", {}).get("device") == parameter_device
    # Sizes, accumulation and precision follow the run's own flags.
    for name in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        assert config[name] == "auto"
    assert (config["bf16"]["enabled"], config["fp16"]["enabled"]) == ("auto", "auto")


def test_without_deepspeed() -> None:
    assert deepspeed_config(None) is None
    assert zero_stage(None) == 0


def test_json_file_and_dict(tmp_path: Path) -> None:
    config = {"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}}
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(config, indent=2), encoding="utf-8")
    assert deepspeed_config(json.dumps(config)) == config
    assert deepspeed_config(f"\n  {json.dumps(config)}") == config
    assert deepspeed_config(str(path)) == config
    assert deepspeed_config(config) == config


def test_a_preset_is_not_changed_by_its_user() -> None:
    first = deepspeed_config("zero2")
    assert first is not None
    first["zero_optimization"]["stage"] = 9
    assert zero_stage(deepspeed_config("zero2")) == 2


def test_unknown_preset_names_the_choices() -> None:
    with pytest.raises(UserError) as caught:
        deepspeed_config("zero9")
    assert str(caught.value).startswith(
        "--deepspeed zero9: choose zero0, zero1, zero2, zero3, zero2_offload, zero3_off"
    )


def test_a_folder_is_no_configuration(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a JSON text or a file"):
        deepspeed_config(str(tmp_path))


@pytest.mark.parametrize(("text", "line"), [('{"a": 1,\n "b"}', 2), ("{", 1)])
def test_broken_json(tmp_path: Path, text: str, line: int) -> None:
    path = tmp_path / "ds.json"
    path.write_text(text, encoding="utf-8")
    for value in (text, str(path)):
        with pytest.raises(UserError, match=f"--deepspeed.*broken JSON at line {line}"):
            deepspeed_config(value)


@pytest.mark.parametrize("content", [b"[1, 2]", b'"zero2"', b"\xff\xfe\x00"])
def test_a_file_that_holds_no_configuration(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "ds.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match="--deepspeed"):
        deepspeed_config(str(path))


@pytest.mark.parametrize(
    ("config", "dtype", "expected"),
    [
        ({"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}}, "bfloat16", None),
        ({"bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto"}}, "float32", None),
        ({"fp16": {"enabled": False}}, "float32", None),
        (None, "float32", None),
        ({"bf16": {"enabled": True}}, "float32", "switches bf16 on but --torch_dtype is float32"),
        ({"fp16": {"enabled": True}}, "bfloat16", "switches fp16 on but --torch_dtype is bfloat16"),
        ({"zero_optimization": {"stage": 0}}, "bfloat16", "ZeRO stage 0 in bfloat16"),
        ({"zero_optimization": {"stage": 0}}, "float32", None),
        ({"bf16": {"enabled": False}}, "bfloat16", "switches bf16 off but --torch_dtype is bfloat16"),
    ],
)
def test_precision_of_file_and_flag_agree(config: dict[str, Any] | None, dtype: str, expected: str | None) -> None:
    if expected is None:
        check_precision(config, dtype)
        return
    with pytest.raises(UserError, match=expected):
        check_precision(config, dtype)
