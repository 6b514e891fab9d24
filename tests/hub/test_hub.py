"""rayswift.hub against a hub on 127.0.0.1: the real ModelScope, Hugging Face and S3 clients do the transfers."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hub_server import HubServer, Repo, running_hub

from rayswift.errors import UserError
from rayswift.hub import models as hub

# Read when the client is imported: its four tries per listing would cost seven seconds in each test without a server.
os.environ.setdefault("MODELSCOPE_REPO_TREE_PAGE_MAX_ATTEMPTS", "1")

WEIGHTS = bytes(range(256)) * 4096
MODEL = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b"{}",
    "model.safetensors": WEIGHTS,
    "pytorch_model.bin": b"pickle",
    "onnx/model.onnx": b"onnx",
    "original/consolidated.00.pth": b"pickle",
}
WANTED = {"config.json", "tokenizer.json", "model.safetensors"}
HUBS = pytest.mark.parametrize("use_hf", [False, True], ids=["modelscope", "huggingface"])


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A hub with one public model, and caches, tokens and endpoints of this test's own."""
    from huggingface_hub import constants

    with running_hub() as running:
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "MODELSCOPE_API_TOKEN", "AWS_ENDPOINT_URL"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(hub, "RETRY_SECONDS", 0.01)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", running.url)
        monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "ms"))
        monkeypatch.setenv("MODELSCOPE_HOME", str(tmp_path / "ms_home"))
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        monkeypatch.setenv("RAYSWIFT_CACHE", str(tmp_path / "rayswift"))
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        # huggingface_hub read these from the environment when it was imported.
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        running.repos["model", "org/model"] = Repo(dict(MODEL))
        yield running


def names_in(folder: str) -> set[str]:
    return {str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file()}


def refusal(call: Callable[..., object], *args: object, **kwargs: object) -> str:
    """The message of the UserError that the call raises: one line."""
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Download, cache, resume ---------------------------------------------------------------------------------------------


@HUBS
def test_a_model_arrives_whole_without_pickles_and_other_frameworks(server: HubServer, use_hf: bool) -> None:
    folder = hub.resolve_model("org/model", use_hf=use_hf)
    assert names_in(folder) == WANTED
    assert Path(folder, "model.safetensors").read_bytes() == WEIGHTS
    assert os.path.isabs(folder)


@HUBS
def test_the_second_call_sends_no_bodies_and_works_without_the_server(server: HubServer, use_hf: bool) -> None:
    folder = hub.resolve_model("org/model", use_hf=use_hf)
    assert hub.resolve_model("org/model", use_hf=use_hf) == folder
    assert set(server.bodies.values()) == {1}
    server.close()
    assert hub.resolve_model("org/model", use_hf=use_hf) == folder


@HUBS
def test_a_cut_connection_is_resumed_and_the_file_is_whole(server: HubServer, use_hf: bool) -> None:
    weights = os.urandom(24 << 20)  # the clients keep whole chunks of 1 MB and 10 MB
    server.repos["model", "org/model"].files["model.safetensors"] = weights
    server.repos["model", "org/model"].cut_once = {"model.safetensors"}
    folder = hub.resolve_model("org/model", use_hf=use_hf)
    assert server.ranges == [f"bytes={(10 if use_hf else 12) << 20}-"]
    assert hashlib.sha256(Path(folder, "model.safetensors").read_bytes()).digest() == hashlib.sha256(weights).digest()


@HUBS
def test_only_a_file_that_changed_on_the_hub_is_fetched_again(server: HubServer, use_hf: bool) -> None:
    hub.resolve_model("org/model", use_hf=use_hf)
    # As long as before: only its hash tells.
    server.repos["model", "org/model"].files["config.json"] = b'{"model_type": "qwen3"}'
    folder = hub.resolve_model("org/model", use_hf=use_hf)
    assert json.loads(Path(folder, "config.json").read_text()) == {"model_type": "qwen3"}
    assert server.bodies["config.json"] == 2
    assert server.bodies["model.safetensors"] == 1


@HUBS
def test_a_file_that_was_deleted_or_cut_short_in_the_cache_is_fetched_again(server: HubServer, use_hf: bool) -> None:
    folder = hub.resolve_model("org/model", use_hf=use_hf)
    weights = Path(folder, "model.safetensors")
    weights.unlink() if use_hf else weights.write_bytes(WEIGHTS[:100])
    hub.resolve_model("org/model", use_hf=use_hf)
    assert weights.read_bytes() == WEIGHTS


@HUBS
def test_offline_mode_uses_the_cache_and_asks_nobody(
    server: HubServer, use_hf: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    folder = hub.resolve_model("org/model", use_hf=use_hf)
    asked = server.listings
    monkeypatch.setenv("MODELSCOPE_OFFLINE", "1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub.resolve_model("org/model", use_hf=use_hf) == folder
    assert server.listings == asked
    assert "offline mode is set and the cache has no copy" in refusal(hub.resolve_model, "org/other", use_hf=use_hf)


@HUBS
def test_a_model_that_the_hubs_own_client_cached_is_used_offline(server: HubServer, use_hf: bool) -> None:
    if use_hf:
        from huggingface_hub import snapshot_download

        folder = snapshot_download("org/model", endpoint=server.url, allow_patterns=sorted(WANTED))
    else:
        from modelscope_hub import HubApi, HubConfig

        folder = str(HubApi(HubConfig()).download_repo("org/model", "model", allow_patterns=sorted(WANTED)))
    server.close()
    assert hub.resolve_model("org/model", use_hf=use_hf) == folder


def test_an_unfinished_copy_is_not_taken_for_a_model_offline(server: HubServer, tmp_path: Path) -> None:
    folder = tmp_path / "ms" / "models" / "org--model" / "snapshots" / "master"
    folder.mkdir(parents=True)
    (folder / "config.json").write_bytes(MODEL["config.json"])
    (folder / "model.safetensors.incomplete").write_bytes(WEIGHTS[:10])
    server.close()
    assert "unfinished" in refusal(hub.resolve_model, "org/model")


_CHILD = """
import logging, sys
import filelock, huggingface_hub, modelscope_hub
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
from rayswift.hub import resolve_model
print("READY", flush=True)
sys.stdin.readline()
print("FOLDER", resolve_model("org/model", use_hf=sys.argv[1] == "True"))
"""


@HUBS
def test_two_processes_at_once_download_each_file_once(server: HubServer, use_hf: bool, tmp_path: Path) -> None:
    server.repos["model", "org/model"].delay = 1.0
    env = {**os.environ, "HF_HOME": str(tmp_path / "hf_home"), "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-c", _CHILD, str(use_hf)]
    children = [
        subprocess.Popen(command, env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(2)
    ]
    for child in children:
        assert child.stdout is not None and child.stdout.readline() == "READY\n"
    for child in children:
        assert child.stdin is not None
        child.stdin.write("go\n")
        child.stdin.flush()
    outputs = [child.communicate(timeout=60)[0] for child in children]
    assert [child.returncode for child in children] == [0, 0]
    assert dict(server.bodies) == dict.fromkeys(WANTED, 1)
    assert sum("waiting for another process" in output for output in outputs) == 1
    assert len({line for output in outputs for line in output.splitlines() if line.startswith("FOLDER")}) == 1


# Who may read it, and what is not there ------------------------------------------------------------------------------


@HUBS
def test_a_private_model_needs_the_token_and_no_message_shows_it(
    server: HubServer, use_hf: bool, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    caplog.set_level(logging.DEBUG)
    server.repos["model", "org/private"] = Repo(dict(MODEL), token="tok-right")
    without = refusal(hub.resolve_model, "org/private", use_hf=use_hf)
    assert "--model org/private" in without and "give --hub_token" in without
    wrong = refusal(hub.resolve_model, "org/private", use_hf=use_hf, token="tok-wrong")
    assert "check the spelling" in wrong if use_hf else "this --hub_token may not read it" in wrong
    folder = hub.resolve_model("org/private", use_hf=use_hf, token="tok-right")
    assert names_in(folder) == WANTED
    written = [path.read_text(errors="replace") for path in tmp_path.rglob("*.json") if path.is_file()]
    assert not any("tok-" in text for text in [without, wrong, caplog.text, *written])


def test_a_gated_model_names_the_token_and_the_terms(server: HubServer) -> None:
    server.repos["model", "org/gated"] = Repo(dict(MODEL), token="tok-right", gated=True)
    message = refusal(hub.resolve_model, "HF::org/gated", token="tok-wrong")
    assert "HTTP 403" in message and "terms accepted" in message and "--hub_token" in message


@HUBS
def test_a_wrong_id_names_the_spelling_and_the_other_hub(server: HubServer, use_hf: bool) -> None:
    message = refusal(hub.resolve_model, "org/modle", use_hf=use_hf, token="tok")
    assert message.startswith("--model org/modle: ") and "check the spelling" in message
    assert ("MS::org/modle" if use_hf else "--use_hf true") in message


@HUBS
def test_a_wrong_revision_is_named(server: HubServer, use_hf: bool) -> None:
    assert "at revision v9" in refusal(hub.resolve_model, "org/model", use_hf=use_hf, revision="v9")


@HUBS
def test_no_network_and_no_copy_says_both(server: HubServer, use_hf: bool, caplog: pytest.LogCaptureFixture) -> None:
    server.close()
    message = refusal(hub.resolve_model, "org/model", use_hf=use_hf)
    assert "Connection refused" in message and "the cache has no copy" in message and "local folder" in message
    assert [record.getMessage()[-10:] for record in caplog.records if record.name == "rayswift.hub"] == [
        "try 2 of 3",
        "try 3 of 3",
    ]


@HUBS
def test_a_server_error_that_passes_is_tried_again(server: HubServer, use_hf: bool) -> None:
    server.unavailable = 2
    assert names_in(hub.resolve_model("org/model", use_hf=use_hf)) == WANTED
    assert server.unavailable == 0


def test_a_model_larger_than_the_disk_is_refused_before_the_download(server: HubServer) -> None:
    server.repos["model", "org/model"].listed_sizes = {"model.safetensors": 10**17}
    message = refusal(hub.resolve_model, "org/model")
    assert "needs 100000000.00 GB" in message and "MODELSCOPE_CACHE" in message
    assert not server.bodies


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /dev/full")
def test_a_disk_that_fills_up_on_the_way_is_named(server: HubServer, tmp_path: Path) -> None:
    folder = tmp_path / "ms" / "models" / "org--model" / "snapshots" / "master"
    folder.mkdir(parents=True)
    (folder / "model.safetensors.incomplete").symlink_to("/dev/full")
    message = refusal(hub.resolve_model, "org/model")
    assert "no space left" in message and "MODELSCOPE_CACHE" in message


def test_a_cache_that_cannot_be_written_is_named(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "file"))
    message = refusal(hub.resolve_model, "org/model")
    assert "cannot write to" in message and "MODELSCOPE_CACHE" in message


def test_paths_that_leave_the_folder_are_not_downloaded(server: HubServer, tmp_path: Path) -> None:
    server.repos["model", "org/model"].files["../../../../../escaped.json"] = b"{}"
    assert names_in(hub.resolve_model("org/model")) == WANTED
    assert not list(tmp_path.rglob("escaped.json"))


# Ids, prefixes and local folders -------------------------------------------------------------------------------------


def test_prefixes_win_over_use_hf_in_any_case(server: HubServer, tmp_path: Path) -> None:
    assert str(tmp_path / "hf") in hub.resolve_model("hf::org/model", use_hf=False)
    assert str(tmp_path / "ms") in hub.resolve_model("ms::org/model", use_hf=True)


@pytest.mark.parametrize("name", ["", "nowhere", "/no/such/folder", "./x", "~/no-such-folder", "a/b/c", "output/"])
def test_what_looks_local_and_is_not_there_is_no_such_folder(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where the tests run, output/ may well exist
    assert f"--model {name}: no such folder" in refusal(hub.resolve_model, name)


@pytest.mark.parametrize("name", ["org/mo del", "org/..", "../etc", "org/m?x=1", "org/m%2e", "org/a..b", "HF::org/é"])
def test_an_id_with_other_characters_is_refused_without_network(name: str) -> None:
    assert "no such folder" in refusal(hub.resolve_model, name)


def test_an_existing_folder_wins_and_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / "org" / "model"
    folder.mkdir(parents=True)
    assert "no config.json there" in refusal(hub.resolve_model, "org/model")
    (folder / "config.json").touch()
    assert hub.resolve_model("org/model") == hub.resolve_model("~/org/model") == str(folder)
    assert "is a file" in refusal(hub.resolve_model, "org/model/config.json")
    index = {"weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model-1-of-2.safetensors").touch()
    message = refusal(hub.resolve_model, "org/model")
    assert "1 of 2 weight files are missing" in message and "model-2-of-2.safetensors" in message


def test_an_adapter_folder_and_a_run_folder_are_told_apart(tmp_path: Path) -> None:
    checkpoint = tmp_path / "v0" / "checkpoint-54"
    checkpoint.mkdir(parents=True)
    (checkpoint / "adapter_config.json").touch()
    assert hub.resolve_adapter(str(checkpoint)) == str(checkpoint)
    assert "did you mean its checkpoint-54?" in refusal(hub.resolve_adapter, str(tmp_path / "v0"))


def test_a_repository_that_is_no_model_is_refused_before_its_weights_come(server: HubServer) -> None:
    server.repos["model", "org/gguf"] = Repo({"model.safetensors": WEIGHTS})
    assert "--model org/gguf: no config.json there" in refusal(hub.resolve_model, "org/gguf")
    assert not server.bodies


def test_ignore_patterns_leave_the_weights_out_and_a_later_call_fetches_them(server: HubServer) -> None:
    tokenizer = hub.resolve_model("org/model", ignore_patterns=["*.safetensors", "*.bin"])
    assert names_in(tokenizer) == WANTED - {"model.safetensors"}
    assert names_in(hub.resolve_model("org/model")) == WANTED
    assert set(server.bodies.values()) == {1}


def test_pickles_are_taken_where_there_is_nothing_else(server: HubServer) -> None:
    server.repos["model", "org/old"] = Repo({"config.json": b"{}", "pytorch_model.bin": b"pickle", "tf_model.h5": b"h"})
    assert names_in(hub.resolve_model("org/old")) == {"config.json", "pytorch_model.bin"}


# URIs ----------------------------------------------------------------------------------------------------------------


def test_a_folder_under_a_uri_is_copied_once_and_follows_changes(server: HubServer, tmp_path: Path) -> None:
    source = tmp_path / "bucket" / "my-model"
    for name, body in MODEL.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(body)
    folder = hub.resolve_model(f"file://{source}/")
    assert names_in(folder) == WANTED and os.path.basename(folder) == "my-model"
    before = os.stat(os.path.join(folder, "model.safetensors")).st_mtime_ns
    (source / "config.json").write_bytes(b'{"changed": true}')
    assert hub.resolve_model(f"file://{source}") == folder
    assert Path(folder, "config.json").read_bytes() == b'{"changed": true}'
    assert os.stat(os.path.join(folder, "model.safetensors")).st_mtime_ns == before
    assert "no such folder" in refusal(hub.resolve_model, f"file://{source}-x")


@pytest.mark.parametrize(("scheme", "variable"), [("s3", "AWS_ENDPOINT_URL"), ("oss", "OSS_ENDPOINT")])
def test_object_stores_are_reached_at_the_endpoint_of_the_environment(
    server: HubServer, monkeypatch: pytest.MonkeyPatch, scheme: str, variable: str
) -> None:
    monkeypatch.setenv(variable, server.url)
    server.buckets["bucket"] = {f"models/m/{name}": body for name, body in MODEL.items()}
    folder = hub.resolve_model(f"{scheme}://bucket/models/m")
    assert names_in(folder) == WANTED
    assert Path(folder, "model.safetensors").read_bytes() == WEIGHTS
    assert "no such folder" in refusal(hub.resolve_model, f"{scheme}://bucket/models/n")


def test_oss_without_an_endpoint_names_the_variable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAYSWIFT_CACHE", str(tmp_path))
    for name in ("OSS_ENDPOINT", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    assert "set OSS_ENDPOINT" in refusal(hub.resolve_model, "oss://bucket/m")


def test_remote_uris_are_told_from_paths_and_ids() -> None:
    assert all(map(hub.is_remote_uri, ["s3://b/x", "oss://b", "gs://b/x", "hdfs://n:9000/x", "file:///x"]))
    assert not any(map(hub.is_remote_uri, ["org/model", "/x", "./x", "HF::org/model", "C:/x", ""]))


# Datasets ------------------------------------------------------------------------------------------------------------

README = b"""---
license: apache-2.0
configs:
- config_name: default
  data_files:
  - split: train
    path: data/train-*
  - split: test
    path: [data/test-*.parquet]
- config_name: zh
  data_files: "zh/**/*.jsonl"
---
# A dataset
"""


@HUBS
def test_a_dataset_gives_the_files_of_its_split_and_fetches_no_others(server: HubServer, use_hf: bool) -> None:
    server.repos["dataset", "org/data"] = Repo(
        {
            "README.md": README,
            "data/train-00001.parquet": b"b",
            "data/train-00000.parquet": b"a",
            "data/test-00000.parquet": b"t",
            "zh/deep/rows.jsonl": b"{}",
            "zh/notes.txt": b"",
        }
    )
    train = hub.resolve_dataset("org/data", use_hf=use_hf)
    assert [Path(path).name for path in train] == ["train-00000.parquet", "train-00001.parquet"]
    assert Path(train[0]).read_bytes() == b"a"
    assert set(server.bodies) == {"README.md", "data/train-00000.parquet", "data/train-00001.parquet"}
    [subset] = hub.resolve_dataset("org/data", use_hf=use_hf, subset="zh")
    assert subset.endswith("zh/deep/rows.jsonl")
    assert "there are default, zh" in refusal(hub.resolve_dataset, "org/data", use_hf=use_hf, subset="en")
    assert "there are train, test" in refusal(hub.resolve_dataset, "org/data", use_hf=use_hf, split="dev")
    server.close()
    assert hub.resolve_dataset("org/data", use_hf=use_hf) == train
    assert "the cache lacks data/test" in refusal(hub.resolve_dataset, "org/data", use_hf=use_hf, split="test")


@HUBS
def test_a_wrong_dataset_id_names_the_dataset_flag(server: HubServer, use_hf: bool) -> None:
    assert "--dataset org/dat: " in refusal(hub.resolve_dataset, "org/dat", use_hf=use_hf, token="tok")


def test_a_long_listing_is_read_page_by_page(server: HubServer) -> None:
    files = {f"data/{number:04}.jsonl": b"{}" for number in range(210)}
    server.repos["dataset", "org/many"] = Repo({**files, "data/x.csv": b""})
    assert len(hub.resolve_dataset("org/many")) == 210


def test_a_local_clone_gives_its_files_and_a_file_itself(tmp_path: Path) -> None:
    for name in ("train.jsonl", "test.jsonl", ".git/train.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert hub.resolve_dataset(str(tmp_path)) == [str(tmp_path / "train.jsonl")]
    assert hub.resolve_dataset(str(tmp_path / "test.jsonl")) == [str(tmp_path / "test.jsonl")]


def choose(paths: list[str], readme: str = "", subset: str | None = None, split: str = "train") -> list[str]:
    texts = {"README.md": readme}
    listed = sorted([*paths, *(["README.md"] if readme else [])])
    return hub.choose_data_files("org/name", listed, texts.__getitem__, subset=subset, split=split)


@pytest.mark.parametrize(
    ("paths", "subset", "split", "expected"),
    [
        (["a.jsonl", "b.jsonl"], None, "train", ["a.jsonl", "b.jsonl"]),
        (["train.csv", "test.csv", "val.csv"], None, "train", ["train.csv"]),
        (["train.csv", "test.csv", "dev.csv"], None, "validation", ["dev.csv"]),
        (["rows.jsonl", "rows_eval.jsonl"], None, "train", ["rows.jsonl"]),
        (["train/0.parquet", "test/0.parquet"], None, "test", ["test/0.parquet"]),
        (["train_sft-0.parquet", "test_sft-0.parquet"], None, "train_sft", ["train_sft-0.parquet"]),
        (["en/train.jsonl", "zh/train.jsonl"], "zh", "train", ["zh/train.jsonl"]),
        (["en.jsonl", "zh.jsonl", "zh_hard.jsonl"], "zh", "train", ["zh.jsonl", "zh_hard.jsonl"]),
        (["a.jsonl.gz", "b.json.zst", "c.zip"], None, "train", ["a.jsonl.gz", "b.json.zst"]),
        (["a.jsonl", "a.parquet"], None, "train", ["a.parquet"]),
        (["a.txt", "b.txt", "rows.csv"], None, "train", ["rows.csv"]),
        (["rows.jsonl", "dataset_infos.json", "requirements.txt", "LICENSE.txt"], None, "train", ["rows.jsonl"]),
        (["constrained.jsonl", "latest.jsonl"], None, "train", ["constrained.jsonl", "latest.jsonl"]),
    ],
)
def test_names_say_split_subset_and_format(
    paths: list[str], subset: str | None, split: str, expected: list[str]
) -> None:
    assert choose(paths, subset=subset, split=split) == expected


@pytest.mark.parametrize(
    ("paths", "subset", "split", "message"),
    [
        (["train.csv", "test.csv"], None, "validation", "no split 'validation'; there are test, train"),
        (["en/0.jsonl", "zh/0.jsonl"], "fr", "train", "no subset 'fr'; there are en, zh"),
        (["data.zip", "load.py"], None, "train", "behind a loading script, which is never run"),
        (["data.zip"], None, "train", "no data file there"),
    ],
)
def test_names_that_do_not_fit_say_what_there_is(
    paths: list[str], subset: str | None, split: str, message: str
) -> None:
    assert message in refusal(choose, paths, subset=subset, split=split)


@pytest.mark.parametrize(
    ("configs", "expected"),
    [
        ("- {config_name: a, data_files: x/*.jsonl}", ["x/1.jsonl"]),
        ("- {config_name: a, data_files: [x/1.jsonl, ./y/1.jsonl]}", ["x/1.jsonl", "y/1.jsonl"]),
        ("- {config_name: a, data_files: {train: y/1.jsonl, test: x/1.jsonl}}", ["y/1.jsonl"]),
        ("- {config_name: a, data_dir: x}", ["x/1.jsonl", "x/deep/2.jsonl"]),
        ("- {config_name: a, data_dir: x, data_files: '*'}", ["x/1.jsonl"]),
        ("- {config_name: a, data_files: x}\n- {config_name: b, data_files: y, default: true}", ["y/1.jsonl"]),
        ("- {config_name: a, data_files: '[x-y]/?.jsonl'}", ["x/1.jsonl", "y/1.jsonl"]),
        ("- {config_name: a}", ["x/1.jsonl", "x/deep/2.jsonl", "y/1.jsonl"]),
        ("- [broken", ["x/1.jsonl", "x/deep/2.jsonl", "y/1.jsonl"]),
    ],
)
def test_every_spelling_of_data_files_is_understood(configs: str, expected: list[str]) -> None:
    paths = ["x/1.jsonl", "x/deep/2.jsonl", "y/1.jsonl"]
    assert choose(paths, readme=f"---\nconfigs:\n{configs}\n---\n") == expected


def test_several_subsets_and_none_chosen_names_them() -> None:
    readme = "---\nconfigs:\n- {config_name: a, data_files: x}\n- {config_name: b, data_files: y}\n---\n"
    assert "choose one as org/name:NAME from a, b" in refusal(choose, ["x/1.csv", "y/1.csv"], readme=readme)
    assert choose(["x/1.csv", "y/1.csv"], readme=readme, subset="b") == ["y/1.csv"]


def test_modelscopes_structure_file_names_the_data() -> None:
    structure = '{"default": {"train": {"meta": "all.csv", "file": ""}, "test": {"meta": "held_out.csv", "file": ""}}}'
    paths = ["all.csv", "held_out.csv", "name.json"]
    read = {"name.json": structure}.__getitem__
    assert hub.choose_data_files("org/name", paths, read) == ["all.csv"]
    assert hub.choose_data_files("MS::org/name", paths, read, split="test") == ["held_out.csv"]
    rows = {"name.json": '[{"query": "q", "response": "r"}]'}.__getitem__
    assert hub.choose_data_files("org/name", ["name.json"], rows) == ["name.json"]
    assert "all.csv of subset 'default' are not in the repository" in refusal(
        hub.choose_data_files, "org/name", ["name.json", "other.csv"], read
    )
