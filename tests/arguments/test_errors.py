"""Every mistake is one line that names the flag and the mend."""

from __future__ import annotations

import shlex

import pytest

from rayswift.arguments import format_help, make_arguments, parse_arguments
from rayswift.arguments.commands import flags_of
from rayswift.errors import UserError
from rayswift.redaction import redact_text


def lines_of(command_line: str) -> list[str]:
    command, *words = shlex.split(command_line)
    with pytest.raises(UserError) as error:
        parse_arguments(command, words)
    return str(error.value).split("\n")


SFT = "sft --model m --dataset d"


@pytest.mark.parametrize(
    ("command_line", "expected"),
    [
        (
            f"{SFT} --node_labels zone",
            "--node_labels zone: expected LABEL=VALUE,…, found zone=, for example "
            "--node_labels ray.io/accelerator-type=A100-80G",
        ),
        # unknown
        ("sft --hlep", "unknown flag --hlep; did you mean --help?"),
        (f"{SFT} --lerning_rate 1", "unknown flag --lerning_rate; did you mean --learning_rate?"),
        (f"{SFT} --xyzzy 1", "unknown flag --xyzzy; rayswift sft --help lists the flags"),
        (f"{SFT} --lora_d 1", "--lora_d is short for several flags: --lora_dropout, --lora_dtype"),
        (
            f"{SFT} --use_galore true",
            "--use_galore true needs --train_type full: an adapter's gradients are small already",
        ),
        (
            f"{SFT} --train_type full --lisa_activated_layers 2 --use_galore true",
            "--lisa_activated_layers contradicts --use_galore true: give one of the two",
        ),
        (
            "rlhf --rlhf_type dpo --model m --dataset d --train_type adalora",
            "--train_type adalora: the reference is a second adapter, and PEFT has one AdaLoRA a model; give lora",
        ),
        (f"{SFT} --lorap_lr_ratio 16", "--lorap_lr_ratio is SWIFT's; RaySwift does not have it yet"),
        (
            f"{SFT} --optimizer muonclip",
            "--optimizer muonclip: SWIFT has it, RaySwift has not; PyTorch has Muon without the clipping of queries "
            "and keys; give --optimizer muon, for example --optimizer muon",
        ),
        (
            f"{SFT} --optimizer muon --deepspeed zero2",
            "--optimizer muon contradicts --deepspeed, which flattens the matrices it works on; drop one",
        ),
        (f"{SFT} --quant_method bnb", "--quant_method bnb needs --quant_bits, for example --quant_bits 4"),
        (f"{SFT} --quant_method bnb --quant_bits 3", "--quant_bits 3: --quant_method bnb does 4, 8"),
        (
            f"{SFT} --quant_method bnb --quant_bits 4 --train_type full",
            "--quant_method bnb contradicts --train_type full: such weights stay as they are",
        ),
        (
            f"{SFT} --quant_method hqq --quant_bits 4 --train_type vera",
            "--train_type vera contradicts --quant_method hqq: PEFT has lora on such weights",
        ),
        (
            f"{SFT} --target_parameters experts.down_proj --lora_dropout 0.1",
            "--target_parameters contradicts --lora_dropout above 0: PEFT has no such adapter for parameters; drop one",
        ),
        (
            f"{SFT} --train_type adalora --deepspeed zero2",
            "--train_type adalora contradicts --deepspeed: it reads gradients that DeepSpeed keeps; drop one",
        ),
        (
            f"{SFT} --train_type adalora --adalora_init_r 8",
            "--adalora_init_r 8: ranks become smaller; give more than --adalora_target_r",
        ),
        (
            f"{SFT} --rope_scaling ntk",
            "--rope_scaling ntk: choose from linear, dynamic, yarn, or give JSON, for example --rope_scaling yarn",
        ),
        (
            f"{SFT} --no_cuda true",
            "--no_cuda is SWIFT's; in RaySwift use --use_gpu false",
        ),
        (f"{SFT} --rlhf_type dpo", "--rlhf_type is no flag of rayswift sft, but of rayswift rlhf"),
        (f"{SFT} --seed 1 stray", "unexpected 'stray': a value with spaces needs quotes"),
        (f"{SFT} --seed 1 2", "unexpected '2': a value with spaces needs quotes"),
        ("sft -model m --dataset d", "-model: flags start with two hyphens, --model"),
        ("sft \u2014model m --dataset d", "\u2014model: flags start with two hyphens, --model"),
        # values
        (
            f"{SFT} --torch_dtype int7",
            "--torch_dtype int7: choose from bfloat16, float16, float32, for example --torch_dtype bfloat16",
        ),
        (
            f"{SFT} --deepspeed zero9",
            "--deepspeed zero9: choose from zero0, zero1, zero2, zero3, zero2_offload, zero3_offload, "
            "or give JSON or the path of a .json file, for example --deepspeed zero2",
        ),
        (f"{SFT} --deepspeed conf/ds.json", "--deepspeed conf/ds.json: no such file, for example --deepspeed zero2"),
        (f"{SFT} --deepspeed '{{bad'", "--deepspeed {bad: not valid JSON"),
        (
            f"{SFT} --train_type reft",
            "--train_type reft: SWIFT has it, RaySwift has not; PEFT has no interventions; --train_type ia3 trains as "
            "few weights, for example --train_type lora",
        ),
        (f"{SFT} --max_steps ten", "--max_steps ten: expected a whole number, for example --max_steps 1000"),
        (f"{SFT} --max_steps 1.5", "--max_steps 1.5: expected a whole number"),
        (f"{SFT} --max_steps", "--max_steps needs a value, for example --max_steps 1000"),
        (f"{SFT} --max_steps 0", "--max_steps 0: expected -1"),
        (f"{SFT} --packing maybe", "--packing maybe: expected true or false"),
        (f"{SFT} --learning_rate fast", "--learning_rate fast: expected a number, for example --learning_rate 1e-4"),
        (f"{SFT} --learning_rate nan", "--learning_rate nan: expected a number"),
        (f"{SFT} --weight_decay -1e-4", "--weight_decay -1e-4: expected a number at least 0"),
        (f"{SFT} --lr_scheduler_type round", "--lr_scheduler_type round: choose from linear, cosine"),
        (f"{SFT} --optim sdg", "--optim sdg: choose from adamw_torch"),
        (f"{SFT} --columns text", "--columns text: expected JSON or the path of a .json file"),
        (f"{SFT} --columns '[1]'", "--columns [1]: expected a JSON object in braces"),
        (f"{SFT} --system gone.txt", "--system gone.txt: cannot read this file"),
        (
            f"{SFT} --num_workers two",
            "--num_workers two: expected N or MIN,MAX with 1 <= MIN <= MAX, for example --num_workers 4",
        ),
        (f"{SFT} --num_workers 4,1", "--num_workers 4,1: expected N or MIN,MAX"),
        (f"{SFT} --num_workers 0", "--num_workers 0: expected N or MIN,MAX"),
        (f"{SFT} --max_length 0", "--max_length 0: expected a whole number at least 1"),
        (f"{SFT} --lora_rank 0", "--lora_rank 0: expected a whole number at least 1"),
        (
            f"{SFT} --per_device_train_batch_size 0",
            "--per_device_train_batch_size 0: expected a whole number at least 1",
        ),
        (f"{SFT} --save_steps 0", "--save_steps 0: expected a number above 0"),
        (f"{SFT} --split_dataset_ratio 1", "--split_dataset_ratio 1: expected a number at least 0 and below 1"),
        (f"{SFT} --external_plugins no.py", "--external_plugins no.py: no such file"),
        ("deploy --model m --port 70000", "--port 70000: expected a whole number at least 1 and at most 65535"),
        # what is missing
        ("sft --dataset d", "--model is required"),
        ("sft --model m", "--dataset is required"),
        ("infer", "--model or --adapters is required"),
        ("sample --model m", "--dataset is required"),
        ("eval --model m", "--eval_dataset is required"),
        ("export --model m", "nothing to do: give --merge_lora"),
        # contradictions
        (f"{SFT} --streaming true", "--streaming true needs --max_steps"),
        (f"{SFT} --packing true --lazy_tokenize true", "--packing true contradicts --lazy_tokenize true"),
        (
            f"{SFT} --streaming true --max_steps 5 --lazy_tokenize true",
            "--lazy_tokenize true contradicts --streaming true",
        ),
        (f"{SFT} --zero_hpz_partition_size 8", "--zero_hpz_partition_size needs --deepspeed zero3"),
        (f"{SFT} --deepspeed zero2 --zero_hpz_partition_size 8", "--zero_hpz_partition_size needs --deepspeed zero3"),
        (f"{SFT} --deepspeed zero2 --fsdp full_shard", "--deepspeed contradicts --fsdp"),
        (
            f"{SFT} --load_best_model_at_end true --eval_strategy no",
            "--load_best_model_at_end true contradicts --eval_strategy no",
        ),
        (
            f"{SFT} --load_best_model_at_end true --split_dataset_ratio 0",
            "contradicts --split_dataset_ratio 0 without --val_dataset",
        ),
        (f"{SFT} --load_best_model_at_end true --save_strategy no", "contradicts --save_strategy no"),
        (
            f"{SFT} --load_best_model_at_end true --eval_steps 50 --save_steps 75",
            "--load_best_model_at_end true contradicts --save_steps 75 with --eval_steps 50",
        ),
        (f"{SFT} --lazy_tokenize true --cached_dataset c", "--lazy_tokenize true contradicts --cached_dataset"),
        (
            f"{SFT} --lazy_tokenize true --train_sampling_strategy group_by_length",
            "--lazy_tokenize true contradicts --train_sampling_strategy group_by_length",
        ),
        (
            f"{SFT} --interleave_by tokens --lazy_tokenize true",
            "--interleave_by tokens contradicts --lazy_tokenize true",
        ),
        (
            f"{SFT} --interleave_by tokens --streaming true --max_steps 5",
            "--interleave_by tokens contradicts --streaming true",
        ),
        (f"{SFT} --interleave_prob 0.5 0.5", "--interleave_prob has 2 values but --dataset names 1"),
        ("sft --model m --dataset a b --interleave_prob 0.5 0.1", "--interleave_prob adds up to 0.6"),
        (f"{SFT} --fp16 true --torch_dtype bfloat16", "--fp16 true contradicts --torch_dtype bfloat16"),
        (f"{SFT} --bf16 true --torch_dtype float16", "--bf16 true contradicts --torch_dtype float16"),
        (f"{SFT} --train_type full --pure_bf16 true --torch_dtype float32", "--pure_bf16 true contradicts"),
        (f"{SFT} --train_type full --pure_bf16 true --fp16 true", "--pure_bf16 true contradicts --fp16 true"),
        (f"{SFT} --train_type full --pure_bf16 true --deepspeed zero2", "--pure_bf16 true contradicts --deepspeed"),
        (f"{SFT} --bf16 true --fp16 true", "--fp16 true contradicts --bf16 true"),
        (f"{SFT} --warmup_ratio 0.1 --warmup_steps 5", "--warmup_ratio 0.1 contradicts --warmup_steps 5"),
        (f"{SFT} --train_type full --adapters a", "--adapters contradicts --train_type full"),
        (
            f"{SFT} --use_gpu false --resources_per_worker '{{\"GPU\": 1}}'",
            "--use_gpu false contradicts --resources_per_worker",
        ),
        (f"{SFT} --adapters a b", "--adapters: training goes on with one adapter"),
        (f"{SFT} --push_to_hub true --hub_model_id o/m", "--push_to_hub: training pushes nothing; afterwards rayswift"),
        (f"{SFT} --fsdp full_shard", "--fsdp: not built; --deepspeed zero3 shards the model over the workers"),
        (f"{SFT} --auto_find_batch_size true", "--auto_find_batch_size: not built; set --per_device_train_batch_size"),
        (
            f"{SFT} --train_sampling_strategy group_by_lenght",
            "--train_sampling_strategy group_by_lenght: choose from random, sequential, group_by_length",
        ),
        (f"{SFT} --metric_for_best_model acc", "--metric_for_best_model acc: choose from loss, token_acc"),
        (
            "rlhf --model m --dataset d --metric_for_best_model token_acc",
            "--metric_for_best_model token_acc: choose from loss, rewards/chosen",
        ),
        (f"{SFT} --include_num_input_tokens_seen some", "--include_num_input_tokens_seen some: choose from no, all"),
        (
            f"{SFT} --streaming true --max_steps 5 --load_best_model_at_end true",
            "--load_best_model_at_end true contradicts --split_dataset_ratio 0 without --val_dataset",
        ),
        ("infer --model m --merge_lora true", "--merge_lora true needs --adapters"),
        ("infer --model m --top_logprobs 3", "--top_logprobs needs --logprobs true"),
        ("deploy --model m --api_key=", "--api_key is empty (a variable that is not set?)"),
        ("deploy --model m --min_replicas 3 --max_replicas 1", "--max_replicas 1 is below --min_replicas 3"),
        ("export --model m --quant_method awq --quant_bits 4", "--quant_method awq needs --dataset"),
        ("export --model m --push_to_hub true", "--push_to_hub true needs --hub_model_id"),
        ("rlhf --model m --dataset d --rlhf_type grpo", "--rlhf_type grpo needs --reward_funcs or --reward_model"),
        (
            "rlhf --model m --dataset d --rlhf_type grpo --reward_funcs accuracy --num_generations 1",
            "--num_generations 1: GRPO compares the answers to a prompt; give at least 2",
        ),
        ("rlhf --model m --dataset d --use_vllm true", "--use_vllm true contradicts --rlhf_type dpo"),
        (
            "deploy --model m --task_type embedding --adapter_root .",
            "--task_type embedding takes adapters with vLLM only: --infer_backend vllm",
        ),
        (
            'deploy --model m --vllm_engine_kwargs \'{"hf_token":"X"}\'',
            "--vllm_engine_kwargs holds a secret, which Ray Serve would show with the deployment's settings: set it in "
            "the environment of the nodes, for example HF_TOKEN",
        ),
        (
            "deploy --model m --allowed_origins https://a.example.com/chat",
            "--allowed_origins https://a.example.com/chat: expected * or scheme://host[:port] without a path",
        ),
        ("app --model m --infer_backend vllm --task_type embedding", "--task_type embedding"),
    ],
)
def test_one_line_names_the_mend(command_line: str, expected: str) -> None:
    lines = lines_of(command_line)
    assert len(lines) == 1, lines
    assert expected in redact_text(lines[0])  # as it is printed: nothing of the mend is masked


def test_all_mistakes_are_listed_at_once() -> None:
    lines = lines_of("sft --torch_dtype int7 --lora_rank 0 --streaming --lerning_rate 3")
    assert [line.split()[0] for line in lines] == [
        "unknown",
        "--torch_dtype",
        "--lora_rank",
        "--model",
        "--dataset",
        "--streaming",
    ]


def test_a_value_that_cannot_be_read_contradicts_nothing() -> None:
    assert lines_of(f"{SFT} --streaming --max_steps ten") == [
        "--max_steps ten: expected a whole number, for example --max_steps 1000"
    ]


def test_python_keywords_get_the_same_messages() -> None:
    with pytest.raises(UserError, match="--lora_rank 0: expected a whole number at least 1"):
        make_arguments("sft", model="m", dataset=["d"], lora_rank=0)
    with pytest.raises(UserError, match="unknown flag --modle; did you mean --model"):
        make_arguments("sft", modle="m", dataset=["d"])


@pytest.mark.parametrize(
    ("words", "warning"),
    [
        ("--save_strategy best --split_dataset_ratio 0", "--save_strategy best: without validation rows the last step"),
        ("--seed 1 --seed 2", "--seed is given more than once: the last one counts"),
        ("...", "ignored ..."),
    ],
)
def test_harmless_settings_are_warned_about(words: str, warning: str, caplog: pytest.LogCaptureFixture) -> None:
    parse_arguments("sft", [*SFT.split()[1:], *words.split()])
    assert warning in caplog.text


@pytest.mark.parametrize(
    ("words", "warning"),
    [
        ("--loss_scale last_round+hermes", "--loss_scale last_round+hermes: answers are compared whole"),
        ("--loss_scale last_round+ignore_empty_think", ""),
    ],
)
def test_what_pairs_do_not_have_is_said(words: str, warning: str, caplog: pytest.LogCaptureFixture) -> None:
    parse_arguments("rlhf", ["--model", "m", "--dataset", "d", *words.split()])
    assert bool(caplog.messages) == bool(warning)
    assert warning in caplog.text


def test_an_open_address_without_a_key_is_said(caplog: pytest.LogCaptureFixture) -> None:
    parse_arguments("deploy", ["--model", "m", "--host", "0.0.0.0", "--api_key", "k"])
    assert "--host" not in caplog.text
    parse_arguments("deploy", ["--model", "m", "--host", "0.0.0.0"])
    assert "--host 0.0.0.0 without --api_key: whoever reaches this machine" in caplog.text


@pytest.mark.parametrize(
    ("command_line", "flag"),
    [
        ("sft --model m --dataset d --dataset_num_proc 4", "dataset_num_proc"),
        ("sft --model m --dataset d --dataloader_num_workers 4", "dataloader_num_workers"),
        ("sft --model m --dataset d --padding_side left", "padding_side"),
        ("sft --model m --dataset d --download_mode force_redownload", "download_mode"),
        ("infer --model m --val_dataset d --write_batch_size 8", "write_batch_size"),
        ("infer --model m --vllm_use_async_engine true", "vllm_use_async_engine"),
        ("infer --model m --infer_backend vllm --use_async_engine true", "vllm_use_async_engine"),
        ("infer --model m --base_url http://h/v1 --vllm_use_async_engine true", "vllm_use_async_engine"),
    ],
)
def test_flags_that_change_nothing_say_so_once(
    command_line: str, flag: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    command, *words = command_line.split()
    parse_arguments(command, words)
    reason = flags_of(command)[flag].no_effect
    assert isinstance(reason, str)
    assert caplog.messages == [f"--{flag} has no effect here: {reason}"]
    monkeypatch.setenv("COLUMNS", "400")
    assert f"; no effect here: {reason} (default: " in format_help(command)


def test_swift_flags_that_ask_for_nothing_pass() -> None:
    parse_arguments("sft", [*SFT.split()[1:], "--use_galore", "false", "--lorap_lr_ratio", "none"])


def test_ellipsis_as_a_keyword_is_kept() -> None:
    assert make_arguments("infer", model="m", response_prefix="...").response_prefix == "..."
