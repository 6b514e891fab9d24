"""An encoded dataset as a folder: ``export --to_cached_dataset true`` writes it, ``--cached_dataset`` and
``--cached_val_dataset`` read it.

The folder holds the token rows of the training and validation part in their order (Arrow files ``train-*.arrow``,
``val-*.arrow``, schema of :func:`rayswift.data.flow.stage.token_schema`) and, in ``cached_dataset.json``, the settings
they were encoded with. SWIFT's cached datasets hold rows and lengths; these hold the token ids.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayswift.data.flow.cache import encoder_hash
from rayswift.data.flow.stage import token_schema
from rayswift.data.tokens.arrow_files import read_columns
from rayswift.data.tokens.row_index import RowIndex, TrainData, all_rows, concat
from rayswift.data.tokens.table import TokenRows
from rayswift.errors import UserError
from rayswift.files import atomic_folder, parse_json

if TYPE_CHECKING:
    import pyarrow as pa

    from rayswift.data.tokens.encoder import Encoder

_SETTINGS = "cached_dataset.json"
#: Rows of a file, and of a record batch in it.
ROWS_PER_FILE = 1 << 18
ROWS_PER_BATCH = 4096


def save_cached_dataset(folder: str, data: TrainData, encoder: Encoder) -> None:
    """Write the token rows of a dataset as a folder, whole or not at all; one that is there is replaced."""
    settings = {**encoder.settings(), "model_dir": os.path.basename(encoder.model_dir)}
    text = json.dumps({"encoder": settings, "encoder_hash": encoder_hash(encoder)}, ensure_ascii=False, indent=2)
    with atomic_folder(folder) as built:
        for part, rows in (("train", data.train), ("val", data.val)):
            if rows is not None:
                _write_part(built, part, rows)
        (built / _SETTINGS).write_text(text, encoding="utf-8")


def _write_part(folder: Path, part: str, rows: RowIndex) -> None:
    import pyarrow as pa

    read = TokenRows(rows)
    for number, first in enumerate(range(0, len(rows), ROWS_PER_FILE)):
        with pa.ipc.new_file(folder / f"{part}-{number:05}.arrow", token_schema()) as file:
            last = min(first + ROWS_PER_FILE, len(rows))
            for start in range(first, last, ROWS_PER_BATCH):
                file.write_batch(_batch(read, range(start, min(start + ROWS_PER_BATCH, last))))


def _batch(read: TokenRows, numbers: range) -> pa.RecordBatch:
    import pyarrow as pa

    rows = [read[number] for number in numbers]
    columns = [[row.input_ids for row in rows], [row.labels for row in rows], [row.loss_scale for row in rows],
               [row.rejected_start for row in rows], list(numbers), [len(row.input_ids) for row in rows],
               [row.text_ends for row in rows], [row.targets for row in rows]]  # fmt: skip
    schema = token_schema()
    arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
    return pa.record_batch(arrays, schema)


def load_cached_datasets(folders: list[str], val_folders: list[str], encoder: Encoder) -> tuple[RowIndex, RowIndex]:
    """The training and validation rows of ``--cached_dataset`` and ``--cached_val_dataset``, each empty where there are
    none.

    ``FOLDER/train`` and ``FOLDER/val`` are the parts of a folder, as SWIFT names them; a whole folder trains its
    training part, and is validated on the other. As ``--cached_val_dataset`` it is its validation part where it has
    one, else all of it.

    Raises:
        UserError: no such folder, or it was encoded with other settings.
    """
    trains, vals = [], {}
    for given in folders:
        folder, part = _folder_and_part("--cached_dataset", given, encoder)
        if part != "val":
            trains.append(_read_part(folder, "train"))
        if part != "train":
            vals[folder] = _read_part(folder, "val")
    for given in val_folders:
        folder, part = _folder_and_part("--cached_val_dataset", given, encoder)
        rows = _read_part(folder, part or "val")
        vals[folder] = rows if part or len(rows) else _read_part(folder, "train")
    return concat(trains), concat(list(vals.values()))


def _folder_and_part(flag: str, given: str, encoder: Encoder) -> tuple[str, str | None]:
    """A folder that is right for the encoder, and which part of it is meant."""
    folder, part = os.path.split(given.rstrip("/"))
    if part not in ("train", "val") or os.path.isdir(given):
        folder, part = given, ""
    try:
        _check(folder, encoder)
    except UserError as error:
        raise UserError(str(error).replace("--cached_dataset", flag)) from None
    return folder, part or None


def _check(folder: str, encoder: Encoder) -> None:
    try:
        saved = parse_json((Path(folder) / _SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(
            f"--cached_dataset {folder}: no cached dataset there (its {_SETTINGS} is missing); "
            "rayswift export --to_cached_dataset true writes one"
        ) from None
    if saved["encoder_hash"] == encoder_hash(encoder):
        return
    if saved["encoder"].get("pairs", False) != encoder.preference:
        mode = "rlhf" if encoder.preference else "train"
        raise UserError(f"--cached_dataset {folder}: export it with --template_mode {mode} for this command")
    now: dict[str, Any] = json.loads(json.dumps(encoder.settings()))
    differing = [
        f"--{name} {saved['encoder'].get(name)} (now {now[name]})"
        for name in now
        if name != "model_dir" and saved["encoder"].get(name) != now[name]
    ]
    raise UserError(
        f"--cached_dataset {folder}: it was encoded with {', '.join(differing) or 'another tokenizer'}; "
        "train with the same settings, or export it again"
    )


def _read_part(folder: str, part: str) -> RowIndex:
    import numpy as np

    files = sorted(str(file) for file in Path(folder).glob(f"{part}-*.arrow"))
    lengths = [np.zeros(0, np.int32), *(read_columns(file, ["length"])[0] for file in files)]
    return RowIndex(files, all_rows([len(found) for found in lengths[1:]]), np.concatenate(lengths))
