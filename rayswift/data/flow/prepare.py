"""The data path: files → standard rows → token rows, each stage in the token cache; then sample, split and blend.

The unit of work is a chunk of a data file (:mod:`rayswift.data.flow.encode_tasks`). Order is a function of the files
and the seed, never of timing. Rows that cannot be used are counted with reason and place. (Streams are Ray Data's:
:mod:`rayswift.data.flow.stream`.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rayswift.data.files import chunk_bytes, plan_chunks
from rayswift.data.flow.cache import TokenCache, tokens_key
from rayswift.data.flow.encode_tasks import EncodeTask, encode_all, report_of
from rayswift.data.flow.export import load_cached_datasets
from rayswift.data.flow.stage import refuse_bad_rows, standard_batches
from rayswift.data.names import ResolvedDataset, ResolvedDatasets
from rayswift.data.tokens.arrow_files import default_root, read_columns
from rayswift.data.tokens.row_index import (
    DropReport,
    LazyRows,
    RowIndex,
    TrainData,
    all_rows,
    blend,
    concat,
    iter_standard_rows,
    sample_rows,
    split_rows,
)
from rayswift.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from rayswift.data.tokens.encoder import Encoder

#: Rows whose token rows are looked up together: the search needs ten times the memory of its answer.
ORDER_PIECE = 2**16


OnProgress = Callable[[str, int], None]


def first_usable_row(datasets: list[ResolvedDataset], strict: bool) -> dict[str, Any] | None:
    """Read each dataset up to its first usable batch, in this process, before anything expensive starts.

    Returns:
        The first usable standard row; None without a dataset.

    Raises:
        UserError: a file is broken there (names file:line), or holds no usable row at all.
    """
    first = None
    for dataset in datasets:
        drops = DropReport()
        usable = None
        for batch in (
            batch for chunk in plan_chunks(dataset.files) for batch in standard_batches(chunk, dataset.rules)
        ):
            drops.merge(batch.report)
            refuse_bad_rows(drops, strict)
            if batch.rows:
                usable = batch.rows[0]
                break
        if usable is None:
            reasons = "; ".join(drops.lines()) or "it is empty"
            raise UserError(f"--dataset {dataset.spec.text}: no usable row: {reasons}")
        first = first or usable
    return first


def load_train_data(
    args: Any,
    datasets: ResolvedDatasets,
    encoder: Encoder,
    on_progress: OnProgress,
    cache: TokenCache | None = None,
) -> TrainData:
    """Read, standardise, sample, split and encode ``--dataset`` and ``--val_dataset``; what is cached is not redone.

    Args:
        args: training arguments.
        datasets: where their rows are.
        encoder: turns standard rows into token ids.
        on_progress: called with a stage name and the number of rows done in it.
        cache: where rows and tokens are kept; None for this machine's.

    Raises:
        UserError: unreadable row (names file:line), no usable row, ``--strict true`` and a bad row.
    """
    import numpy as np

    cache = cache or TokenCache(default_root(), args.load_from_cache_file)
    lazy = bool(getattr(args, "lazy_tokenize", False))  # a command that only encodes has no such flag
    run = _Load(encoder, cache, args.strict, lazy, on_progress)
    rng = np.random.RandomState(args.data_seed)
    # What is never evaluated is trained.
    own_val = datasets.val or args.cached_val_dataset
    ratio = 0.0 if own_val or _evaluates_nothing(args) else args.split_dataset_ratio
    # A stream is read while it trains; nothing is held out of it.
    parts = [
        split_rows(run.standard_rows(dataset), ratio, dataset.spec.num_samples, args, rng)
        for dataset in ([] if args.streaming else datasets.train)
    ]
    trained = [kept for kept, _ in parts]
    val = concat(
        [held_out for _, held_out in parts]
        + [sample_rows(run.standard_rows(dataset), dataset.spec.num_samples, args, rng) for dataset in datasets.val]
    )
    if args.val_dataset_shuffle:
        val = val.select(rng.permutation(len(val)))
    run.encode([val] if lazy else [*trained, val])
    encoded_val = run.token_rows(val)
    encoded = run.lazy_rows(blend(trained, args, rng)) if lazy else run.blended(trained, args, rng)
    if args.cached_dataset or args.cached_val_dataset:
        cached, cached_val = load_cached_datasets(args.cached_dataset, args.cached_val_dataset, encoder)
        encoded, encoded_val = concat([encoded, cached]), concat([encoded_val, cached_val])
        if args.dataset and args.dataset_shuffle:
            encoded = encoded.select(rng.permutation(len(encoded)))
    if not args.streaming and not len(encoded):
        reasons = "; ".join(run.drops.lines())
        raise UserError(f"--dataset {' '.join(args.dataset)}: no row is left to train on; {reasons}")
    val_rows = list(iter_standard_rows(val)) if ratio and len(val) else []
    origins = {cache.path(task.key): (file, task.chunk.path) for file, task in run.tasks.items()}
    return TrainData(None if args.streaming else encoded, encoded_val or None, run.drops, val_rows, origins)


def _evaluates_nothing(args: Any) -> bool:
    """Whether a training run never evaluates (a command that only encodes has no such flags)."""
    strategy = getattr(args, "eval_strategy", None) or getattr(args, "save_strategy", None)
    return strategy == "no" and not getattr(args, "eval_on_start", False)


class _Load:
    """The chunks of one run: their standard rows, then the token rows of those that were chosen."""

    def __init__(self, encoder: Encoder, cache: TokenCache, strict: bool, lazy: bool, on_progress: OnProgress) -> None:
        self.encoder, self.cache, self.strict, self.lazy, self.on_progress = encoder, cache, strict, lazy, on_progress
        self.drops = DropReport()
        # By the path of its standard rows, what was or will be made of a chunk.
        self.tasks: dict[str, EncodeTask] = {}

    def standard_rows(self, dataset: ResolvedDataset) -> RowIndex:
        """All usable rows of a dataset. Where every row will be wanted as tokens, it is encoded on the way."""
        import numpy as np

        name = dataset.spec.text
        tasks = []
        for chunk in plan_chunks(dataset.files):
            key = self.cache.rows_key(chunk, dataset.rules)
            every = dataset.spec.num_samples is None and not self.lazy
            wanted = tokens_key(key, self.encoder) if every else None
            tasks.append(EncodeTask(chunk, dataset.rules, key, wanted, size=chunk_bytes(chunk)))
        self._build(tasks, f"read {name}")
        seen = report_of(tasks, [self._summary(task.rows_key) for task in tasks])
        self.drops.rows_in += seen.rows_in
        self.drops.merge(seen)
        files = [self.cache.path(task.rows_key) for task in tasks]
        self.tasks |= dict(zip(files, tasks, strict=True))
        counts = [self._summary(task.rows_key)["rows"] for task in tasks]
        if not sum(counts):
            reasons = "; ".join(seen.lines()) or "it is empty"
            raise UserError(f"--dataset {name}: none of its {seen.rows_in} rows can be used: {reasons}")
        return RowIndex(files, all_rows(counts), np.zeros(sum(counts), np.int32))

    def encode(self, parts: list[RowIndex]) -> None:
        """Encode the rows of these parts that are not encoded yet."""
        import numpy as np

        wanted = dict.fromkeys(file for part in parts for file in _files_of(part))
        chosen: dict[str, list[np.ndarray]] = {file: [] for file in wanted if self.tasks[file].tokens_key is None}
        for file, rows in ((file, rows) for part in parts if chosen for file, rows in _rows_by_file(part)):
            if file in chosen:
                chosen[file].append(rows)
        for file, found in chosen.items():
            task, numbers = self.tasks[file], np.unique(np.concatenate(found))
            every = self._summary(task.rows_key)["rows"]
            subset = None if len(numbers) == every else numbers
            key, size = tokens_key(task.rows_key, self.encoder, subset), task.size * len(numbers) // every
            self.tasks[file] = replace(task, tokens_key=key, row_subset=subset, size=size)
        self._build([self.tasks[file] for file in chosen], "encode")
        tasks = [self.tasks[file] for file in wanted]
        self.drops.merge(report_of(tasks, [self._summary(task.key) for task in tasks]))

    def token_rows(self, rows: RowIndex) -> RowIndex:
        """For each standard row in turn, the token rows that came from it (none if dropped, several if split)."""
        import numpy as np

        files = _files_of(rows)
        places: dict[str, list[int]] = {}
        for place, file in enumerate(rows.files):
            places.setdefault(file, []).append(place)
        sizes = [self._summary(self.tasks[file].rows_key)["rows"] for file in files]
        total = sum(sizes)
        # Numbers of all rows together: as small as they can be.
        bases = np.zeros(len(rows.files), np.int32 if total < 2**31 else np.int64)
        base = 0
        origins, lengths = [bases[:0]], [np.zeros(0, np.int32)]
        for file, size in zip(files, sizes, strict=True):
            source, length = read_columns(self.cache.path(self.tasks[file].key), ["source", "length"])
            bases[places[file]] = base
            origins.append(source.astype(bases.dtype) + bases.dtype.type(base))
            lengths.append(length)
            base += size
        order = _selected_order(np.concatenate(origins), bases, rows.index)
        index = all_rows([len(length) for length in lengths[1:]])
        paths = [self.cache.path(self.tasks[file].key) for file in files]
        return RowIndex(paths, index, np.concatenate(lengths)).select(order)

    def blended(self, parts: list[RowIndex], args: Any, rng: np.random.RandomState) -> RowIndex:
        """The token rows of several datasets together."""
        tokens = [self.token_rows(part) for part in parts]
        empty = next((number for number, rows in enumerate(tokens) if not len(rows)), None)
        if args.interleave_prob and empty is not None:
            reasons = "; ".join(self.drops.lines())
            raise UserError(f"--dataset {args.dataset[empty]}: no row is left to mix in; {reasons}")
        return blend(tokens, args, rng)

    def lazy_rows(self, rows: RowIndex) -> LazyRows:
        """Standard rows with what is needed to encode each when it is trained."""
        import numpy as np

        origins = [self.tasks[file].chunk.path for file in rows.files]
        return LazyRows(rows.files, rows.index, np.ones(len(rows), np.int32), origins)

    def _build(self, tasks: list[EncodeTask], stage: str) -> None:
        done = 0

        def count(rows: int) -> None:
            nonlocal done
            done += rows
            self.on_progress(stage, done)

        encode_all(tasks, self.encoder, self.cache, self.strict, count)

    def _summary(self, key: str) -> dict[str, Any]:
        summary = self.cache.summary(key)
        if summary is None:
            raise UserError(f"the token cache {self.cache.root} lost an entry; run again, or set RAYSWIFT_CACHE")
        return summary


def _files_of(rows: RowIndex) -> list[str]:
    """The files that rows come from, each once."""
    import numpy as np

    return list(dict.fromkeys(rows.files[number] for number in np.unique(rows.index[:, 0])))


def _rows_by_file(rows: RowIndex) -> Iterator[tuple[str, np.ndarray]]:
    """Each file that rows come from, once, with the numbers of these rows in it."""
    import numpy as np

    order = np.argsort(rows.index[:, 0], kind="stable")
    numbers, starts = np.unique(rows.index[order, 0], return_index=True)
    found: dict[str, list[np.ndarray]] = {}
    parts_by_file = np.split(rows.index[order, 1], starts[1:]) if len(rows) else []
    for number, part in zip(numbers, parts_by_file, strict=True):
        found.setdefault(rows.files[number], []).append(part)
    return ((file, np.concatenate(parts)) for file, parts in found.items())


def _selected_order(origins: np.ndarray, bases: np.ndarray, index: np.ndarray) -> np.ndarray:
    """The token rows of each selected row in turn.

    Args:
        origins: the standard row that each token row came from, ascending, numbered over all files.
        bases: the number of each file's first standard row.
        index: the selected rows, ``RowIndex.index``.
    """
    import numpy as np

    pieces = [origins[:0]]
    for start in range(0, len(index), ORDER_PIECE):
        piece = index[start : start + ORDER_PIECE]
        selected = bases[piece[:, 0]] + piece[:, 1]
        first, last = (np.searchsorted(origins, selected, side) for side in ("left", "right"))
        counts = last - first
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        pieces.append((np.repeat(first, counts) + within).astype(origins.dtype))
    return np.concatenate(pieces)
