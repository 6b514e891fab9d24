"""LoRA adapters trained by ``rayswift sft`` beside their base: several at once, more by name, bad ones refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from command_line import QUICK, run, run_directory
from safetensors.torch import load_file, save_file
from serving import MODEL, Deployment, deployed
from steady_load import steady_load, undisturbed

import rayswift

pytestmark = pytest.mark.slow

QUESTIONS = ["Who are you?", "What is your name?", "Who developed you?", "Name three colours.", "What is 2 + 2?"]
MAX_TOKENS = 24
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@dataclass(frozen=True)
class Trained:
    """Checkpoints of three different adapters: two of one run, one of another with another rank."""

    early: Path
    late: Path
    other: Path


@pytest.fixture(scope="module")
def trained(smollm2_dir: str, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Two short trainings at a high rate, so that each adapter answers in its own way."""
    folder = tmp_path_factory.mktemp("trained")

    def train(name: str, steps: int, *flags: str) -> Path:
        run(
            "sft", "--model", smollm2_dir, "--dataset", "identity", "--model_name", name, "--model_author", "swift",
            "--learning_rate", "1e-3", "--max_steps", str(steps), "--split_dataset_ratio", "0",
            "--per_device_train_batch_size", "4", *QUICK, *flags, "--output_dir", str(folder / name),
            log=folder / f"{name}.log",
        )  # fmt: skip
        return run_directory(folder / name)

    robot = train("swift-robot", 16, "--save_steps", "6")
    other = train("ray-bot", 12, "--init_weights", "pissa_niter_4")  # saved as plain LoRA of twice the rank
    return Trained(robot / "checkpoint-6", robot / "checkpoint-16", other / "checkpoint-12")


@pytest.fixture(scope="module")
def expected(trained: Trained, smollm2_dir: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What ``rayswift infer`` answers with each adapter, and without one: greedy, float32."""
    folder = tmp_path_factory.mktemp("expected")
    rows = folder / "questions.jsonl"
    rows.write_text("".join(json.dumps({"query": question}) + "\n" for question in QUESTIONS))

    def answers(**of: Any) -> list[str]:
        results = rayswift.infer(
            val_dataset=[str(rows)], temperature=0, max_new_tokens=MAX_TOKENS, torch_dtype="float32",
            result_path=str(folder / "results.jsonl"), **of,
        )  # fmt: skip
        return [row["response"] for row in results]

    adapters = {name: answers(adapters=[str(path)]) for name, path in vars(trained).items()}
    found = {MODEL: answers(model=smollm2_dir), **adapters}
    assert len({tuple(texts) for texts in found.values()}) == 4, "the adapters do not differ"
    return found


@pytest.fixture(scope="module")
def root(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The adapter root: one good adapter, and those that must be refused; others lie outside of it."""
    root = tmp_path_factory.mktemp("adapters") / "root"
    shutil.copytree(trained.other, root / "other")
    shutil.copytree(trained.other, root.parent / "outside")
    for name, spoil in BAD.items():
        spoil(Path(shutil.copytree(trained.other, root / name)))
    (root / "link").symlink_to(root.parent / "outside")
    return root


@pytest.fixture(scope="module")
def server(
    trained: Trained, root: Path, smollm2_dir: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Deployment]:
    flags = ["--adapters", f"early={trained.early}", f"late={trained.late}", "--adapter_root", str(root)]
    folder = tmp_path_factory.mktemp("served")
    with deployed(smollm2_dir, folder, *flags, "--served_model_name", MODEL) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Deployment) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.base_url, api_key="none", max_retries=0, timeout=120) as client:
        yield client


def answers(client: openai.OpenAI, model: str) -> list[str]:
    """What the endpoint answers as ``model``, plain."""
    return [ask(client, model, question).choices[0].message.content for question in QUESTIONS]


def ask(client: openai.OpenAI, model: str, question: str = QUESTIONS[0], **options: Any) -> Any:
    messages: list[Any] = [{"role": "user", "content": question}]
    return client.chat.completions.create(
        model=model, messages=messages, temperature=0, max_tokens=MAX_TOKENS, **options
    )


# --- good adapters ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [MODEL, "early", "late", f"{MODEL}:late"])
def test_base_and_adapters_answer_as_infer_does(
    client: openai.OpenAI, expected: dict[str, list[str]], name: str
) -> None:
    assert answers(client, name) == expected[name.removeprefix(f"{MODEL}:")]


def test_an_adapter_of_the_root_is_loaded_by_name_while_traffic_runs(
    client: openai.OpenAI, server: Deployment, expected: dict[str, list[str]]
) -> None:
    before = undisturbed(server)
    with steady_load(server) as outcomes:
        found = answers(client, "other")
        streamed = ask(client, "other", stream=True)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in streamed if chunk.choices)
    assert found == expected["other"]
    assert text == expected["other"][0]
    assert outcomes.done and not outcomes.failed(), outcomes.failed()[:3]
    assert not outcomes.altered(before), outcomes.altered(before)[:3]


def test_adapters_are_listed_loaded_under_another_name_and_unloaded(
    client: openai.OpenAI, server: Deployment, expected: dict[str, list[str]]
) -> None:
    def posted(path: str, **body: str) -> int:
        return server.request("POST", path, body)[0]

    assert posted("/v1/load_lora_adapter", lora_name="renamed", lora_path="other") == 200
    assert ask(client, "renamed").choices[0].message.content == expected["other"][0]
    status, listed = server.get("/v1/adapters")
    assert status == 200
    assert all(name in listed.decode() for name in ("early", "late", "other", "renamed"))
    models = [model.id for model in client.models.list().data]
    assert MODEL in models and any("late" in name for name in models)
    assert posted("/v1/unload_lora_adapter", lora_name="renamed") == 200
    with pytest.raises(openai.NotFoundError):
        ask(client, "renamed")
    assert ask(client, "late").choices[0].message.content == expected["late"][0]


# --- refused ----------------------------------------------------------------------------------------------------


def _pickled(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()


def _of_another_base(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    wide = {name: torch.cat([tensor, tensor], 1) if "lora_A" in name else tensor for name, tensor in tensors.items()}
    save_file(wide, folder / WEIGHTS)


def _of_huge_rank(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    repeated = {n: t.repeat(64, 1) if "lora_A" in n else t.repeat(1, 64) for n, t in tensors.items()}
    save_file(repeated, folder / WEIGHTS)
    _configured(folder, r=1024)


def _configured(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | changes))


def _replace_by_link(folder: Path, name: str) -> None:
    (folder / name).unlink()
    (folder / name).symlink_to(folder.parent.parent / "outside" / name)


#: Name below the root → what is wrong with it. All start as copies of a good adapter.
BAD: dict[str, Callable[[Path], Any]] = {
    "pickled": _pickled,
    "other-base": _of_another_base,
    "huge-rank": _of_huge_rank,
    "huge-rank-in-weights-only": lambda folder: (_of_huge_rank(folder), _configured(folder, r=16)),
    "rank-in-config-only": lambda folder: _configured(folder, r=8),
    "linked-weights": lambda folder: _replace_by_link(folder, WEIGHTS),
    "linked-config": lambda folder: _replace_by_link(folder, CONFIG),
    "no-config": lambda folder: (folder / CONFIG).unlink(),
    "broken-config": lambda folder: (folder / CONFIG).write_text("{"),
    "list-as-config": lambda folder: (folder / CONFIG).write_text("[]"),
    "cut-weights": lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:5000]),
    "empty-weights": lambda folder: (folder / WEIGHTS).write_bytes(b""),
    "not-lora": lambda folder: _configured(folder, peft_type="IA3"),
    "dora": lambda folder: _configured(folder, use_dora=True),
    "part-of-the-base": lambda folder: _configured(folder, init_lora_weights="pissa"),
    "rank-is-text": lambda folder: _configured(folder, r="many"),
    "no-modules": lambda folder: _configured(folder, target_modules=["no_such_module"]),
}
#: Names that must not lead anywhere.
PATHS = [
    "link", "../outside", "other/../../outside", "./other/../../outside", "/etc", "..", ".", "other\0", "other//..",
    "%2e%2e/outside", "..\\outside", "~root", "file:///etc", "s3://bucket/x", "other ", "no-such-adapter",
]  # fmt: skip


@pytest.mark.parametrize("name", [*BAD, *PATHS])
def test_a_bad_adapter_is_refused_by_name_and_the_others_go_on(
    client: openai.OpenAI, expected: dict[str, list[str]], name: str
) -> None:
    with pytest.raises(openai.APIStatusError) as refused:
        ask(client, name)
    assert refused.value.status_code in (400, 403, 404, 422)
    if name in BAD and name != "no-config":
        assert refused.value.status_code in (403, 422)
    body: Any = refused.value.body
    assert len(body["message"]) > 20 and "Traceback" not in body["message"]
    assert ask(client, "late").choices[0].message.content == expected["late"][0]


@pytest.mark.parametrize("path", [*BAD, *PATHS])
def test_a_bad_adapter_is_refused_when_it_is_loaded_by_path(server: Deployment, path: str) -> None:
    status, body = server.request("POST", "/v1/load_lora_adapter", {"lora_name": "x", "lora_path": path})
    assert status in (400, 403, 404, 422), body
    assert json.loads(body)["error"]["message"]
    assert server.request("POST", "/v1/unload_lora_adapter", {"lora_name": "x"})[0] in (400, 404)


def test_an_absolute_path_outside_the_root_is_refused(server: Deployment, root: Path) -> None:
    outside = str(root.parent / "outside")
    status, body = server.request("POST", "/v1/load_lora_adapter", {"lora_name": "x", "lora_path": outside})
    assert status in (400, 403), body
