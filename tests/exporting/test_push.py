"""--push_to_hub against a hub on 127.0.0.1: the real ModelScope and Hugging Face clients do the transfers."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from hub_server import HubServer, Repo

from rayswift.arguments import make_arguments
from rayswift.errors import UserError
from rayswift.exporting import export
from rayswift.hub import models as downloads

HUBS = pytest.mark.parametrize("use_hf", [False, True], ids=["modelscope", "huggingface"])
SHARDS = {f"model-0000{part}-of-00003.safetensors": bytes([part]) * 100_000 for part in (1, 2, 3)}


def push(source: str, use_hf: bool, token: str | None = "alice-token", **settings: object) -> str:
    flag = "adapters" if Path(source, "adapter_config.json").exists() else "model"
    given = {flag: source, "push_to_hub": True, "hub_model_id": "alice/tuned", "hub_token": token, "use_hf": use_hf}
    return export(make_arguments("export", **{**given, **settings}))


def refusal(*args: object, **settings: object) -> str:
    with pytest.raises(UserError) as caught:
        push(*args, **settings)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert "-token" not in str(caught.value).replace("--hub_token", "")
    return str(caught.value)


@pytest.fixture
def sharded(tmp_path: Path) -> str:
    """A folder that looks like a model in three large files."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    for name, body in SHARDS.items():
        (folder / name).write_bytes(body)
    return str(folder)


@HUBS
def test_a_pushed_adapter_comes_back_as_it_was_with_a_card_and_without_training_state(
    hub: HubServer, base_and_adapter: tuple[str, str], use_hf: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    base, checkpoint = base_and_adapter
    assert push(checkpoint, use_hf, commit_message="first try") == checkpoint
    files = hub.repos["model", "alice/tuned"].files
    assert {"adapter_config.json", "adapter_model.safetensors", "args.json", "README.md"} <= set(files)
    assert not {"optimizer.pt", "manifest.json"} & set(files)
    assert [message.partition(" (")[0] for message in hub.uploads.messages] == ["first try"]
    pulled = Path(downloads.resolve_adapter("alice/tuned", use_hf=use_hf, token="alice-token"))
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (pulled / name).read_bytes() == (Path(checkpoint) / name).read_bytes()
    card = files["README.md"].decode()
    assert "AI-ModelScope/alpaca-gpt4-data-zh" in card
    assert "| learning_rate | `0.0001` |" in card
    assert str(Path(base).parent) not in card  # a path of this machine says nothing elsewhere
    printed = capsys.readouterr()
    assert f"pushed to {hub.url}" in printed.out
    assert "alice-token" not in printed.out + printed.err


@HUBS
@pytest.mark.parametrize("private", [False, True])
def test_a_repository_is_as_private_as_asked(
    hub: HubServer, base_and_adapter: tuple[str, str], use_hf: bool, private: bool
) -> None:
    push(base_and_adapter[1], use_hf, hub_private_repo=private)
    assert hub.uploads.private == {"alice/tuned": private}


@HUBS
def test_a_push_that_broke_off_goes_on_without_sending_a_large_file_twice(
    hub: HubServer, sharded: str, use_hf: bool
) -> None:
    hub.uploads.cut_after = 1
    assert "run the command again" in refusal(sharded, use_hf)
    assert 1 <= len(hub.uploads.sent) < 3
    assert not set(hub.repos["model", "alice/tuned"].files) & set(SHARDS)
    hub.uploads.cut_after = None
    push(sharded, use_hf)
    assert set(hub.uploads.sent.values()) == {1}
    files = hub.repos["model", "alice/tuned"].files
    assert {name: files[name] for name in SHARDS} == SHARDS


@HUBS
def test_a_second_push_replaces_what_changed(hub: HubServer, sharded: str, use_hf: bool) -> None:
    push(sharded, use_hf)
    Path(sharded, "config.json").write_text('{"model_type": "qwen2"}')
    push(sharded, use_hf)
    assert hub.repos["model", "alice/tuned"].files["config.json"] == b'{"model_type": "qwen2"}'
    assert set(hub.uploads.sent.values()) == {1}


@HUBS
def test_a_readme_of_ones_own_is_pushed_as_it_is(hub: HubServer, sharded: str, use_hf: bool) -> None:
    Path(sharded, "README.md").write_text("# My model\n")
    push(sharded, use_hf)
    assert hub.repos["model", "alice/tuned"].files["README.md"] == b"# My model\n"


@HUBS
@pytest.mark.parametrize(
    ("token", "name", "expected"),
    [
        ("wrong-token", "alice/tuned", "does not know this token"),
        (None, "alice/tuned", "needs a token"),
        ("reader-token", "reader/tuned", "does not let this token write there"),
        ("alice-token", "bob/tuned", "does not let this token write there"),
        ("alice-token", "bob/theirs", "may not write there|does not let this token write there"),
        ("alice-token", "bob/secret", "has it already|does not let this token write there"),
        ("alice-token", "tuned", "expected owner/name"),
        ("alice-token", "alice/my model", "expected owner/name"),
    ],
)
def test_a_refusal_is_one_line_that_says_what_to_do(
    hub: HubServer, sharded: str, use_hf: bool, token: str | None, name: str, expected: str
) -> None:
    import re

    hub.repos["model", "bob/theirs"] = Repo({"config.json": b"{}"})
    hub.repos["model", "bob/secret"] = Repo({"config.json": b"{}"}, token="bob-token")
    assert re.search(expected, refusal(sharded, use_hf, token, hub_model_id=name))
    assert hub.repos["model", "bob/theirs"].files == {"config.json": b"{}"}
    assert not hub.uploads.sent


@HUBS
def test_without_a_network_the_refusal_comes_before_any_work(
    hub: HubServer, base_and_adapter: tuple[str, str], use_hf: bool
) -> None:
    base, checkpoint = base_and_adapter
    hub.close()
    assert "cannot be reached" in refusal(checkpoint, use_hf, merge_lora=True, model=base)
    assert not Path(checkpoint + "-merged").exists()


@HUBS
def test_merging_and_pushing_go_in_one_command(hub: HubServer, base_and_adapter: tuple[str, str], use_hf: bool) -> None:
    base, checkpoint = base_and_adapter
    merged = push(checkpoint, use_hf, merge_lora=True, model=base)
    assert merged == checkpoint + "-merged"
    files = hub.repos["model", "alice/tuned"].files
    assert files["model.safetensors"] == Path(merged, "model.safetensors").read_bytes()
    assert "1.2500" in files["README.md"].decode()  # the validation loss of the run
    assert "1.0000" not in files["README.md"].decode()  # that of step 4, after this checkpoint


def test_nothing_of_a_push_stays_in_the_folder(hub: HubServer, sharded: str) -> None:
    before = sorted(path.name for path in Path(sharded).iterdir())
    hub.uploads.cut_after = 1
    with contextlib.suppress(UserError):
        push(sharded, False)
    hub.uploads.cut_after = None
    push(sharded, False)
    assert sorted(path.name for path in Path(sharded).iterdir()) == before
