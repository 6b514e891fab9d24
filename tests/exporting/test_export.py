"""``rayswift export``: merged models, GGUF files, Modelfiles, PEFT adapters, and what is refused before any work."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from go_template import ollama_render

from rayswift.arguments import make_arguments
from rayswift.cli.main import main
from rayswift.errors import UserError
from rayswift.exporting import export
from rayswift.modeling.adapters import load_adapter
from rayswift.modeling.loading import load_model, load_tokenizer

IDS = torch.arange(3, 40)[None]


def run(**settings: Any) -> str:
    return export(make_arguments("export", **settings))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits.float()


def names_in(folder: str | Path) -> set[str]:
    return {path.name for path in Path(folder).iterdir()}


# Merging -------------------------------------------------------------------------------------------------------------


def test_merged_logits_equal_base_plus_adapter(base_and_adapter: tuple[str, str], tmp_path: Path) -> None:
    base, adapter = base_and_adapter
    merged = run(adapters=[adapter], merge_lora=True, output_dir=str(tmp_path / "out"))
    assert merged == str(tmp_path / "out")
    expected = logits(load_adapter(load_model(base, torch_dtype="float32"), adapter))
    assert (logits(load_model(merged, torch_dtype="float32")) - expected).abs().max() <= 1e-5
    assert (logits(load_model(base, torch_dtype="float32")) - expected).abs().max() > 1e-2


def test_a_merged_bfloat16_model_is_off_by_its_rounding_alone(
    base_and_adapter: tuple[str, str], tmp_path: Path
) -> None:
    base, adapter = base_and_adapter
    load_model(base, torch_dtype="bfloat16").save_pretrained(tmp_path / "half")
    load_tokenizer(base).save_pretrained(tmp_path / "half")
    merged = run(adapters=[adapter], merge_lora=True, model=str(tmp_path / "half"))
    exact = load_adapter(load_model(str(tmp_path / "half"), torch_dtype="float32"), adapter)
    expected = logits(exact)
    rounded = {name: weight.bfloat16() for name, weight in exact.merge_and_unload().state_dict().items()}
    half = load_model(merged, torch_dtype="bfloat16").state_dict()
    assert all(torch.equal(half[name], weight) for name, weight in rounded.items())
    found = logits(load_model(merged, torch_dtype="float32"))
    assert 0 < (found - expected).abs().mean() <= 1e-3
    print("largest difference", float((found - expected).abs().max()), "of", float(expected.abs().max()))


def test_an_adapter_alone_says_which_model_it_belongs_to(base_and_adapter: tuple[str, str]) -> None:
    base, adapter = base_and_adapter
    (Path(adapter) / "args.json").unlink()
    config = Path(adapter) / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": base}))
    assert run(adapters=[adapter], merge_lora=True) == adapter + "-merged"


def test_exist_ok_writes_into_a_folder_and_leaves_other_files_alone(
    base_and_adapter: tuple[str, str], tmp_path: Path
) -> None:
    _, adapter = base_and_adapter
    target = tmp_path / "out"
    target.mkdir()
    (target / "notes.txt").write_text("mine")
    (target / "model-00001-of-00002.safetensors").write_text("of an earlier export")
    with pytest.raises(UserError, match="--exist_ok true"):
        run(adapters=[adapter], merge_lora=True, output_dir=str(target))
    assert names_in(target) == {"notes.txt", "model-00001-of-00002.safetensors"}
    run(adapters=[adapter], merge_lora=True, output_dir=str(target), exist_ok=True)
    assert {"notes.txt", "model.safetensors", "config.json"} <= names_in(target)
    assert "model-00001-of-00002.safetensors" not in names_in(target)
    assert not [name for name in names_in(tmp_path) if name.startswith(".")]


# PEFT ----------------------------------------------------------------------------------------------------------------


def test_an_adapter_of_swifts_tuners_becomes_one_that_peft_reads(
    base_and_adapter: tuple[str, str], tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    base, adapter = base_and_adapter
    inner = tmp_path / "swift" / "default"
    inner.mkdir(parents=True)
    config = json.loads((Path(adapter) / "adapter_config.json").read_text())
    config.pop("peft_type")
    (inner / "adapter_config.json").write_text(json.dumps({**config, "swift_type": "LORA", "use_merged_linear": False}))
    tensors = load_file(Path(adapter) / "adapter_model.safetensors")
    swift = {
        re.sub(r"(lora_[AB])", r"\1.default", name.removeprefix("base_model.model.")): tensor
        for name, tensor in tensors.items()
    }
    save_file(swift, inner / "adapter_model.safetensors")
    done = run(adapters=[str(tmp_path / "swift")], to_peft_format=True, model=base)
    assert done == str(tmp_path / "swift-peft")
    expected = logits(load_adapter(load_model(base, torch_dtype="float32"), adapter))
    assert torch.equal(logits(load_adapter(load_model(base, torch_dtype="float32"), done)), expected)


def test_a_peft_adapter_is_copied_without_its_training_state(base_and_adapter: tuple[str, str]) -> None:
    _, adapter = base_and_adapter
    done = run(adapters=[adapter], to_peft_format=True)
    assert names_in(done) == {"adapter_config.json", "adapter_model.safetensors", "args.json"}


def test_a_merged_model_and_its_base_give_the_adapter_back(
    base_and_adapter: tuple[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base, adapter = base_and_adapter
    merged = run(adapters=[adapter], merge_lora=True)
    with caplog.at_level("INFO", "rayswift"):
        done = run(model=merged, base_model=base, to_peft_format=True)
    assert done == f"{merged}-peft"
    assert "the adapter of rank 8 holds 100.00 % of the difference" in caplog.text  # the rank is that of args.json
    expected = logits(load_adapter(load_model(base, torch_dtype="float32"), adapter))
    found = logits(load_adapter(load_model(base, torch_dtype="float32"), done))
    assert (found - expected).abs().max() <= 1e-5
    wide = run(model=merged, base_model=base, to_peft_format=True, lora_rank=200, output_dir=str(tmp_path / "wide"))
    assert (logits(load_adapter(load_model(base, torch_dtype="float32"), wide)) - expected).abs().max() <= 1e-5
    narrow = run(model=merged, base_model=base, to_peft_format=True, lora_rank=1, output_dir=str(tmp_path / "narrow"))
    assert caplog.records[-1].levelname == "WARNING"
    assert (logits(load_adapter(load_model(base, torch_dtype="float32"), narrow)) - expected).abs().max() > 1e-3


def test_from_a_merged_bfloat16_model_the_adapter_comes_back_but_for_rounding(
    base_and_adapter: tuple[str, str], tmp_path: Path
) -> None:
    base, adapter = base_and_adapter
    half = str(tmp_path / "half")
    load_model(base, torch_dtype="bfloat16").save_pretrained(half)
    load_tokenizer(base).save_pretrained(half)
    merged = run(adapters=[adapter], merge_lora=True, model=half)
    done = run(model=merged, base_model=half, to_peft_format=True)
    expected = logits(load_adapter(load_model(half, torch_dtype="float32"), adapter))
    found = logits(load_adapter(load_model(half, torch_dtype="float32"), done))
    untuned = logits(load_model(half, torch_dtype="float32"))
    assert (found - expected).norm() < 0.1 * (untuned - expected).norm()


def test_models_whose_difference_is_no_adapter_are_refused(base_and_adapter: tuple[str, str], tmp_path: Path) -> None:
    base, _ = base_and_adapter
    other = load_model(base, torch_dtype="float32")
    other.save_pretrained(tmp_path / "other")
    asked = {"model": str(tmp_path / "other"), "base_model": base, "to_peft_format": True, "lora_rank": 4}
    with pytest.raises(UserError, match=r"--base_model .*: has the same weights"):
        run(**asked)
    other.model.norm.weight.data += 1
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match=r"model\.norm\.weight differs too, and LoRA holds Linear layers' weights only"):
        run(**asked)
    assert not (tmp_path / "other-peft").exists()


# GGUF and Ollama -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "tolerance"), [("f32", 1e-5), ("f16", 2e-3), ("bf16", 2e-2), ("q8_0", 2e-2)])
def test_a_gguf_file_is_read_back_with_the_same_logits_and_tokens(
    byte_level_model: str, kind: str, tolerance: float
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = run(model=byte_level_model, to_gguf=kind)
    assert folder == byte_level_model + "-gguf"
    assert names_in(folder) == {f"tiny-chat-{kind}.gguf"}
    back = AutoModelForCausalLM.from_pretrained(folder, gguf_file=f"tiny-chat-{kind}.gguf", dtype=torch.float32)
    expected = logits(load_model(byte_level_model, torch_dtype="float32"))
    assert (logits(back) - expected).abs().max() <= tolerance
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=f"tiny-chat-{kind}.gguf")
    text = "<|im_start|>user\nthe cat sat<|im_end|>\n"
    ids = load_tokenizer(byte_level_model)(text)["input_ids"]
    assert tokenizer(text)["input_ids"] == ids
    assert tokenizer.chat_template == load_tokenizer(byte_level_model).chat_template


def test_coarse_types_keep_the_embeddings_in_eight_bits(byte_level_model: str) -> None:
    import gguf

    folder = run(model=byte_level_model, to_gguf="q4_0")
    reader = gguf.GGUFReader(f"{folder}/tiny-chat-q4_0.gguf")
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert types["token_embd.weight"] == "Q8_0"
    assert types["blk.0.attn_q.weight"] == "Q4_0"
    assert types["blk.0.attn_norm.weight"] == "F32"


def fields_of(modelfile: str) -> tuple[str, str, list[str]]:
    template = re.search(r'^TEMPLATE """(.*?)"""$', modelfile, re.S | re.M)
    system = re.search(r'^SYSTEM """(.*?)"""$', modelfile, re.S | re.M)
    stops = [json.loads(stop) for stop in re.findall(r"^PARAMETER stop (.+)$", modelfile, re.M)]
    assert template
    return template[1], system[1] if system else "", stops


def test_a_modelfile_names_the_gguf_file_and_lays_out_prompts_as_training_did(byte_level_model: str) -> None:
    folder = run(model=byte_level_model, to_gguf="q8_0", to_ollama=True)
    text = (Path(folder) / "Modelfile").read_text()
    assert text.startswith("FROM ./tiny-chat-q8_0.gguf\n")
    template, system, stops = fields_of(text)
    assert (system, stops) == ("", ["<|im_end|>"])
    rounds = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    told = [{"role": "system", "content": "Be kind."}, *rounds, {"role": "user", "content": "Bye"}]
    assert ollama_render(template, told) == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        "Hello<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n"
    )
    assert "PARAMETER num_ctx 128" in text


def test_the_context_fits_a_laptop_unless_asked_otherwise(byte_level_model: str, tmp_path: Path) -> None:
    config = Path(byte_level_model, "config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 131072}))

    def context(**flags: Any) -> str:
        folder = run(model=byte_level_model, to_ollama=True, exist_ok=True, output_dir=str(tmp_path / "o"), **flags)
        return re.search(r"^PARAMETER num_ctx (\d+)$", (Path(folder) / "Modelfile").read_text(), re.M)[1]  # type: ignore[index]

    assert (context(), context(max_length=2048), context(ollama_num_ctx=65536)) == ("8192", "2048", "65536")


def test_a_system_text_of_the_flags_goes_into_the_modelfile(byte_level_model: str, tmp_path: Path) -> None:
    folder = run(model=byte_level_model, to_ollama=True, system="You are a cat.", output_dir=str(tmp_path / "o"))
    text = (Path(folder) / "Modelfile").read_text()
    assert text.startswith(f"FROM {byte_level_model}\n")
    assert fields_of(text)[1] == "You are a cat."


# Refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--model nowhere/at/all --to_gguf q8_0", "no such folder"),
        ("--model {base} --to_gguf q3_k", "--to_gguf q3_k: choose from q8_0"),
        ("--model {base} --to_gguf q8_0", "the tokenizer of"),
        ("--model {base} --to_gguf q8_0 --quant_method int8", "--quant_method does not go with --to_gguf"),
        ("--model {base} --quant_method gptq", "needs --dataset"),
        (
            "--model {base} --quant_method gptq --quant_bits 5 --dataset {rows}",
            "--quant_method gptq does 2, 3, 4, 8",
        ),
        ("--model {base} --quant_method fp8 --quant_bits 4", "--quant_bits 4: --quant_method fp8 does 8"),
        ("--model {base} --quant_method int8 --group_size 0", "--group_size 0"),
        ("--model {base} --quant_method int8 --quant_sym false", "--quant_sym false"),
        ("--model {base} --quant_method int4", "--quant_method int4: choose from"),
        ("--model {base} --merge_lora true", "--merge_lora true needs --adapters"),
        ("--adapters {adapter} --to_peft_format true --lora_rank 4", "--lora_rank is for --base_model"),
        ("--model {base} --to_peft_format true", "needs --adapters, or a merged --model and its --base_model"),
        ("--model {base} --base_model {base} --to_peft_format true", "--lora_rank: the model does not say the rank"),
        ("--adapters {adapter} {adapter} --merge_lora true", "takes one adapter"),
        ("--adapters {adapter} --to_gguf q8_0", "needs --merge_lora true"),
        ("--adapters {adapter} --merge_lora true --to_peft_format true", "leave out --merge_lora"),
        ("--adapters {base} --merge_lora true", "give it as --model"),
        ("--model {base} --to_cached_dataset true --to_ollama true", "one at a time"),
        ("--model {base} --to_gguf q8_0 --ollama_num_ctx 4096", "--ollama_num_ctx is for --to_ollama true"),
        ("--model {base} --to_ollama true --output_dir {base}", "exists already"),
        ("--model {base} --to_ollama true --output_dir {base}/config.json", "is a file"),
        ("--model {base} --to_ollama true --output_dir /proc/x", "cannot be written"),
        ("--model {base} --to_ollama true --max_shard_size huge", "--max_shard_size huge"),
        ("--model {base} --to_ollama true --template nonsense", "--template nonsense"),
        ("--model {base} --push_to_hub true", "needs --hub_model_id"),
        ("--model {base} --push_to_hub true --hub_model_id a/b --commit_message ''", "--commit_message"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    words: str, message: str, base_and_adapter: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shlex

    base, adapter = base_and_adapter
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"query": "hi", "response": "ho"}\n')
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    assert main(["export", *shlex.split(words.format(base=base, adapter=adapter, rows=rows))]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert [line for line in lines if "error: " in line and message in line], lines
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before
