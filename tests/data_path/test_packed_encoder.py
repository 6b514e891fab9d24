"""An encoder works where its model is not: its tokenizer's files travel with it."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import pytest

from rayswift.data.flow.cache import encoder_hash
from rayswift.data.tokens.encoder import Encoded, Encoder
from rayswift.data.tokens.packed_encoder import pack_encoder

ROW = {"messages": [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Elsewhere."}]}


@pytest.fixture
def moved(smollm2_dir: str, tmp_path: Path) -> Path:
    """A model folder that is going to vanish."""
    return Path(shutil.copytree(smollm2_dir, tmp_path / "model"))


def ids(encoder: Encoder) -> list[int]:
    (sample,) = encoder.encode_batch([ROW])
    assert isinstance(sample, Encoded)
    return sample.input_ids.tolist()


def test_on_the_machine_of_the_model_its_own_folder_is_used(smollm2_dir: str) -> None:
    encoder = Encoder(smollm2_dir, max_length=64)
    assert pack_encoder(encoder).unpack() is encoder


@pytest.mark.parametrize("damage", ["gone", "incomplete"])
def test_elsewhere_the_files_are_written_once(
    moved: Path, damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYSWIFT_CACHE", str(tmp_path / "cache"))
    encoder = Encoder(str(moved), max_length=64)
    expected, key = ids(encoder), encoder_hash(encoder)
    sent = pickle.dumps(pack_encoder(encoder))
    # The weights stay behind.
    assert len(sent) < 20e6
    if damage == "gone":
        shutil.rmtree(moved)
    else:
        (moved / "tokenizer.json").write_text("{")
    found = pickle.loads(sent).unpack()
    assert found.model_dir != str(moved)
    assert (ids(found), encoder_hash(found)) == (expected, key)
    written = sorted((tmp_path / "cache" / "tokenizers").rglob("*"))
    assert pickle.loads(sent).unpack() == found
    assert sorted((tmp_path / "cache" / "tokenizers").rglob("*")) == written
