"""``rayswift export --to_cached_dataset true`` and ``--cached_dataset``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rayswift.arguments import make_arguments
from rayswift.cli.main import main
from rayswift.data.flow import encode_tasks, stage
from rayswift.data.flow.cache import TokenCache
from rayswift.data.flow.export import save_cached_dataset
from rayswift.data.flow.prepare import TrainData, load_train_data
from rayswift.data.names import resolve_datasets
from rayswift.data.tokens.encoder import Encoder
from rayswift.data.tokens.row_index import RowIndex
from rayswift.data.tokens.table import TokenRows
from rayswift.errors import UserError

GSM8K = Path(__file__).resolve().parents[1] / "data" / "gsm8k_40.jsonl"


def load(encoder: Encoder, cache: Path, **given: Any) -> TrainData:
    args = make_arguments("sft", model=encoder.model_dir, **given)
    return load_train_data(args, resolve_datasets(args), encoder, lambda *_: None, TokenCache(str(cache)))


def contents(rows: RowIndex | None) -> list[tuple[list[int], list[int], Any]]:
    read = TokenRows(rows)  # type: ignore[arg-type]
    return [
        (row.input_ids.tolist(), row.labels.tolist(), None if row.loss_scale is None else row.loss_scale.tolist())
        for row in (read[number] for number in range(len(read)))
    ]


@pytest.fixture
def cached(smollm2_dir: str, tmp_path: Path, ray_cluster: None) -> Path:
    """GSM8K's rows, encoded by the command itself."""
    folder = tmp_path / "cached"
    words = ["--dataset", str(GSM8K), "--model", smollm2_dir, "--max_length", "512", "--split_dataset_ratio", "0.1"]
    words += ["--streaming", "true"]  # has no effect here, and does no harm
    assert main(["export", "--to_cached_dataset", "true", *words, "--output_dir", str(folder)]) == 0
    return folder


def test_training_on_a_cached_dataset_is_training_on_the_dataset(
    cached: Path, smollm2_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = Encoder(smollm2_dir, max_length=512)
    direct = load(encoder, tmp_path / "a", dataset=[str(GSM8K)], split_dataset_ratio=0.1)
    monkeypatch.setattr(encode_tasks, "encode_rows", None)
    monkeypatch.setattr(stage, "iter_rows", None)
    again = load(encoder, tmp_path / "b", cached_dataset=[str(cached)])
    assert contents(again.train) == contents(direct.train)
    assert contents(again.val) == contents(direct.val)
    assert len(contents(again.val)) == 4


def test_a_cached_dataset_beside_another(cached: Path, smollm2_dir: str, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"query": "Who?", "response": "Me.", "system": "x"}) + "\n")
    encoder = Encoder(smollm2_dir, max_length=512)
    both = load(encoder, tmp_path / "a", dataset=[str(other)], cached_dataset=[str(cached)])
    texts = [encoder.tokenizer.decode(ids) for ids, _, _ in contents(both.train)]
    assert len(texts) == 37
    assert sum("Who?" in text for text in texts) == 1


def test_weights_survive(smollm2_dir: str, tmp_path: Path, ray_cluster: None) -> None:
    rows = tmp_path / "rows.jsonl"
    reply = {"role": "assistant", "content": "yes", "loss_scale": 0.5}
    rows.write_text(json.dumps({"messages": [{"role": "user", "content": "?"}, reply]}) + "\n")
    words = ["--dataset", str(rows), "--model", smollm2_dir, "--split_dataset_ratio", "0", "--max_length", "99"]
    assert main(["export", "--to_cached_dataset", "true", *words, "--output_dir", str(tmp_path / "out")]) == 0
    data = load(Encoder(smollm2_dir, max_length=99), tmp_path / "cache", cached_dataset=[str(tmp_path / "out")])
    ((_, _, weights),) = contents(data.train)
    assert 0.5 in weights


def test_other_settings_and_other_folders_are_refused(cached: Path, smollm2_dir: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"it was encoded with --max_length 512 \(now 256\)"):
        load(Encoder(smollm2_dir, max_length=256), tmp_path / "a", cached_dataset=[str(cached)])
    with pytest.raises(UserError, match="no cached dataset there"):
        load(Encoder(smollm2_dir), tmp_path / "a", cached_dataset=[str(tmp_path)])


def test_an_existing_folder_is_not_overwritten(
    cached: Path, smollm2_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--dataset", str(GSM8K), "--model", smollm2_dir, "--output_dir", str(cached)]
    assert main(["export", "--to_cached_dataset", "true", *words]) == 2
    assert "exists already" in capsys.readouterr().err


def test_an_export_that_fails_leaves_the_folder_that_was_there(
    cached: Path, smollm2_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {file.name: file.read_bytes() for file in cached.iterdir()}

    def full_disk(*_: Any) -> Any:
        raise OSError("No space left on device")

    words = ["--dataset", str(GSM8K), "--model", smollm2_dir, "--output_dir", str(cached), "--exist_ok", "true"]
    with monkeypatch.context() as patched:
        patched.setattr("rayswift.data.flow.export._batch", full_disk)
        with pytest.raises(OSError, match="No space left"):
            main(["export", "--to_cached_dataset", "true", *words])
    assert {file.name: file.read_bytes() for file in cached.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["cached"]
    assert main(["export", "--to_cached_dataset", "true", *words]) == 0
    assert {file.name: file.read_bytes() for file in cached.iterdir()} != before


def test_parts_of_a_cached_dataset_are_named_as_swift_names_them(smollm2_dir: str, tmp_path: Path) -> None:
    """``FOLDER/train`` and ``FOLDER/val``; a whole folder as ``--cached_val_dataset`` is its validation part."""
    encoder, cached = Encoder(smollm2_dir, max_length=512), str(tmp_path / "cached")
    save_cached_dataset(cached, load(encoder, tmp_path / "a", dataset=[str(GSM8K)], split_dataset_ratio=0.1), encoder)

    def sizes(**given: Any) -> tuple[int, int]:
        data = load(encoder, tmp_path / "a", **given)
        return len(data.train or ()), len(data.val or ())

    assert sizes(cached_dataset=[cached]) == (36, 4)
    assert sizes(cached_dataset=[f"{cached}/train"]) == (36, 0)
    for val in (f"{cached}/val", cached):
        assert sizes(cached_dataset=[f"{cached}/train"], cached_val_dataset=[val]) == (36, 4)
    assert sizes(cached_dataset=[cached], cached_val_dataset=[cached]) == (36, 4)
    with pytest.raises(UserError, match=r"^--cached_val_dataset .*: no cached dataset there"):
        sizes(cached_dataset=[cached], cached_val_dataset=[str(tmp_path)])
