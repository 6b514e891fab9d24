"""What there is to see of a dataset's first rows: one process and no Ray, through what training calls for each row."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from rayswift.arguments import PreviewArguments
from rayswift.data.files import Position, filesystem_of, locate, plan_chunks
from rayswift.data.flow.stage import ENCODE_BATCH, read_rows, refuse_bad_rows
from rayswift.data.names import ResolvedDataset
from rayswift.data.rows.standard import WARNINGS, Drop, StandardRow
from rayswift.data.tokens.encoder import IGNORED, Dropped, Encoded, Encoder
from rayswift.data.tokens.row_index import DropReport
from rayswift.errors import UserError
from rayswift.hub import resolve_model

#: A preview needs the tokenizer, not the weights.
_WEIGHTS = ["*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf"]
#: Tokens of a sample that are shown; it may have a million.
MAX_SHOWN_TOKENS = 4096
#: No character of any tokenizer takes more tokens than it has bytes; a few are left for combined ones.
_MAX_TOKENS_PER_CHARACTER = 8


@dataclass(frozen=True)
class TokenText:
    """One token and its text; several where only together they are whole characters. `weight` is 0 if untrained."""

    ids: tuple[int, ...]
    text: str
    weight: float


@dataclass(frozen=True)
class Sample:
    """One encoded sample: how many ids, how many of them are trained, and the texts of the first ones. `side`: `chosen`
    or `rejected`, of a pair."""

    side: str
    num_ids: int
    num_trained: int
    texts: list[TokenText]

    @property
    def num_hidden(self) -> int:
        """Ids beyond the ones whose texts are here."""
        return self.num_ids - sum(len(text.ids) for text in self.texts)


@dataclass(frozen=True)
class ShownRow:
    """A row at each stage; `samples` is empty without a model, and has several entries if the row was split."""

    place: str
    raw: Any
    standard: StandardRow
    samples: list[Sample]


@dataclass
class DatasetPreview:
    """Everything there is to see of one dataset.

    `files`: paths and sizes in bytes. `whole`: every row was read. `standard_rows`, `samples`: what came out of the
    stages. `lengths`: int64, tokens of each row before `--max_length`. `warnings`: columns that were not used.
    """

    name: str
    num_samples: int | None
    files: list[tuple[str, int]]
    encoder: Encoder | None
    shown: list[ShownRow] = field(default_factory=list)
    whole: bool = True
    standard_rows: int = 0
    samples: int = 0
    ids: int = 0
    trained: int = 0
    drops: DropReport = field(default_factory=DropReport)
    warnings: DropReport = field(default_factory=DropReport)
    row_lengths: list[int] = field(default_factory=list)

    @property
    def lengths(self) -> np.ndarray:
        return np.array(self.row_lengths, dtype=np.int64)


@dataclass(frozen=True)
class _Read:
    """A standard row with what it came from."""

    path: str
    position: Position
    raw: Any
    standard: StandardRow


def make_encoder(args: PreviewArguments) -> Encoder:
    """The encoder that ``rayswift sft`` would use; of the model, all but the weights is downloaded."""
    model_dir = resolve_model(
        args.model or "",
        revision=args.model_revision,
        use_hf=args.use_hf,
        token=args.hub_token,
        ignore_patterns=_WEIGHTS,
    )
    return Encoder.for_training(args, model_dir)


def collect(dataset: ResolvedDataset, encoder: Encoder | None, args: PreviewArguments) -> DatasetPreview:
    """Read the first ``--preview_rows`` rows of a dataset and take them through every stage.

    Raises:
        UserError: a broken file, ``--strict true`` and a bad row, or no usable row.
    """
    files = []
    for path in dataset.files:
        filesystem, inner = filesystem_of(path)
        files.append((path, filesystem.get_file_info(inner).size or 0))
    result = DatasetPreview(dataset.spec.text, dataset.spec.num_samples, files, encoder)
    rows = _standard_rows(dataset, args.preview_rows, result)
    tokenizer = encoder.tokenizer if encoder else None
    encoders = []
    if encoder:
        # Of rows with a rejected answer rlhf trains the last round.
        scale = encoder.loss_scale if args.is_set("loss_scale") else "last_round"
        cut = "delete" if encoder.truncation_strategy == "split" else encoder.truncation_strategy  # pairs are not split
        encoders = [encoder, replace(encoder, preference=True, loss_scale=scale, truncation_strategy=cut)]
    while batch := list(itertools.islice(rows, ENCODE_BATCH)):
        result.standard_rows += len(batch)
        samples = _encode(batch, encoders, result) if encoder else [[] for _ in batch]
        for row, encoded in zip(batch, samples, strict=True):
            if len(result.shown) < args.num_shown and (encoded or encoder is None):
                shown = [
                    Sample(side, len(one.input_ids), int((one.labels != IGNORED).sum()), token_texts(tokenizer, one))
                    for sample in encoded
                    for side, one in _sides(sample)
                ]
                result.shown.append(ShownRow(locate(row.path, row.position), row.raw, row.standard, shown))
        refuse_bad_rows(result.drops, args.strict)
    refuse_bad_rows(result.drops, args.strict)
    if not (result.samples if encoder else result.standard_rows):
        reasons = "; ".join(result.drops.lines()) or "it is empty"
        raise UserError(f"--dataset {dataset.spec.text}: no usable row: {reasons}")
    return result


def _standard_rows(dataset: ResolvedDataset, limit: int | None, result: DatasetPreview) -> Iterator[_Read]:
    """Standard rows of the first ``limit`` raw rows; what is dropped is counted in ``result``.

    One row more is looked for, to say whether these are all; it may be a broken one.
    """
    for chunk in plan_chunks(dataset.files):
        for raw, standard, position in read_rows(chunk, dataset.rules):
            if result.drops.rows_in == limit:
                result.whole = False
                return
            result.drops.rows_in += 1
            for row in standard:
                if isinstance(row, Drop):
                    result.drops.drop(row, chunk.path, position)
                    if row.broken:
                        result.whole = False
                        return
                    continue
                for warning in row.pop(WARNINGS, ()):
                    result.warnings.add(warning, 1, chunk.path, position)
                yield _Read(chunk.path, position, raw, row)


def _encode(batch: list[_Read], encoders: list[Encoder], result: DatasetPreview) -> list[list[Encoded]]:
    """The samples of each row, of a row with a rejected answer the pair that rlhf trains. Rows are encoded without a
    limit first, so that every length is known."""
    rows = [row.standard for row in batch]
    outcomes: list[Encoded | Dropped] = []
    for encoder in encoders:
        numbers = [number for number, row in enumerate(rows) if _is_pair(row) is encoder.preference]
        outcomes += _encode_within(rows, numbers, encoder, result)
    samples: list[list[Encoded]] = [[] for _ in batch]
    for outcome in outcomes:
        if isinstance(outcome, Dropped):
            result.drops.add(outcome.reason, 1, batch[outcome.row].path, batch[outcome.row].position)
            continue
        samples[outcome.row].append(outcome)
        result.samples += 1
        result.ids += len(outcome.input_ids)
        result.trained += int((outcome.labels != IGNORED).sum())
    return samples


def _encode_within(
    rows: list[StandardRow], numbers: list[int], encoder: Encoder, result: DatasetPreview
) -> list[Encoded | Dropped]:
    """The outcomes of these rows; the length of each conversation goes into ``result``."""

    def encode(encoder: Encoder, numbers: list[int]) -> list[Encoded | Dropped]:
        outcomes = encoder.encode_batch([rows[number] for number in numbers])
        return [replace(outcome, row=numbers[outcome.row]) for outcome in outcomes]

    outcomes, long = encode(replace(encoder, max_length=None), numbers), []
    for outcome in (outcome for outcome in outcomes if isinstance(outcome, Encoded)):
        lengths = [len(side.input_ids) for _, side in _sides(outcome)]
        result.row_lengths += lengths
        if encoder.max_length is not None and max(lengths) > encoder.max_length:
            long.append(outcome.row)
    return [outcome for outcome in outcomes if outcome.row not in set(long)] + encode(encoder, long)


def _is_pair(row: StandardRow) -> bool:
    return row.get("rejected_response") is not None or row.get("rejected_messages") is not None


def _sides(sample: Encoded) -> list[tuple[str, Encoded]]:
    """The conversations of a pair, or a sample that is none."""
    cut = sample.rejected_start
    if cut is None:
        return [("", sample)]
    parts = {"chosen": slice(cut), "rejected": slice(cut, None)}
    return [(side, Encoded(sample.input_ids[part], sample.labels[part], sample.row)) for side, part in parts.items()]


def token_texts(tokenizer: Any, sample: Encoded, limit: int = MAX_SHOWN_TOKENS) -> list[TokenText]:
    """The first ``limit`` tokens of a sample as texts that add up to the decoded sample.

    Tokens that are parts of one character stand together, unless one is trained and the other is not.
    """
    ids = sample.input_ids[:limit].tolist()
    trained = (sample.labels[:limit] != IGNORED).tolist()
    scale = trained if sample.loss_scale is None else sample.loss_scale[:limit].tolist()
    weights = [float(weight) if is_trained else 0.0 for weight, is_trained in zip(scale, trained, strict=True)]

    def text_of(start: int, end: int) -> str:
        # Decoded behind its neighbour: some tokenizers leave out the blank in front of the first word.
        before = tokenizer.decode(ids[start - 1 : start], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        both = tokenizer.decode(
            ids[max(start - 1, 0) : end], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return str(both[len(before) :] if start else both)

    texts: list[TokenText] = []
    start = 0
    while start < len(ids):
        ends = range(start + 1, min(start + _MAX_TOKENS_PER_CHARACTER, len(ids)) + 1)
        same = [end for end in ends if weights[start:end] == [weights[start]] * (end - start)]
        whole = (end for end in same if "\ufffd" not in text_of(start, end))
        end = next(whole, start + 1)
        texts.append(TokenText(tuple(ids[start:end]), text_of(start, end), weights[start]))
        start = end
    return texts
