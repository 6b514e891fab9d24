"""Rows to the tensors of one ``forward``: padded, joined to one sequence, or pairs."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rayswift.arguments.tasks import TaskSettings
from rayswift.data.tokens.table import TokenizedRow

if TYPE_CHECKING:
    import numpy as np
    import torch

Batch = dict[str, "torch.Tensor"]
Collate = Callable[[Sequence[TokenizedRow]], Batch]


@dataclass(frozen=True)
class Collator:
    """Rows to what one ``forward`` takes.

    pad_token_id: what fills up shorter rows. flat: join the rows to one sequence (packing, ``--padding_free``).
    """

    pad_token_id: int
    flat: bool = False

    def __call__(self, rows: Sequence[TokenizedRow]) -> Batch:
        """One micro-batch; without rows, one that trains nothing (other workers wait for every forward pass)."""
        if not rows:
            import numpy as np

            nothing = np.full(2, self.pad_token_id, np.int32)
            rows = [TokenizedRow(nothing, np.full(2, -100, np.int32))]
        return flatten(rows) if self.flat else pad(rows, self.pad_token_id)


@dataclass(frozen=True)
class PairCollator:
    """Pairs to what TRL's ``DPOTrainer`` takes: ``input_ids``, ``attention_mask``, ``completion_mask``, int64
    (2 · pairs, length), all chosen conversations before all rejected ones; and ``num_pairs``, an int64 scalar."""

    pad_token_id: int

    def __call__(self, rows: Sequence[TokenizedRow]) -> Batch:
        """One micro-batch; without pairs, one of a single answered nothing that counts as no pair."""
        import numpy as np
        import torch

        num_pairs = len(rows)
        if not rows:
            nothing = np.full(4, self.pad_token_id, np.int32)
            rows = [TokenizedRow(nothing, np.array([-100, 0, -100, 0], np.int32), rejected_start=2)]
        chosen, rejected = zip(*(row.chosen_and_rejected() for row in rows), strict=True)
        batch = pad([*chosen, *rejected], self.pad_token_id)
        batch["completion_mask"] = (batch.pop("labels") != -100).long()
        return {**batch, "num_pairs": torch.tensor(num_pairs)}


@dataclass(frozen=True)
class TaskCollator:
    """Rows of a task that tells numbers to one batch of their texts: ``input_ids``, ``attention_mask`` int64 (texts,
    length); ``sizes`` int64, the texts of each row, which stand together; ``targets``: of ``seq_cls`` what its loss
    takes, of ``embedding`` how alike (rows,), of a reranker what fits (texts,).

    Of a reranker's row, each of some positive documents begins a list with some negative ones, drawn for the row.
    """

    pad_token_id: int
    task_type: str
    problem: str
    num_labels: int
    settings: TaskSettings

    def __call__(self, rows: Sequence[TokenizedRow]) -> Batch:
        """One micro-batch; without rows, one text that counts as none."""
        import numpy as np
        import torch

        lists = [one for row in rows for one in self._lists(row)]
        texts = [text for one, _ in lists for text in one] or [np.full(2, self.pad_token_id, np.int32)]
        batch = pad([TokenizedRow(text, np.full(len(text), -100, np.int32)) for text in texts], self.pad_token_id)
        del batch["labels"]
        targets = self._targets([told for _, told in lists])
        return {**batch, "sizes": torch.tensor([len(one) for one, _ in lists], dtype=torch.int64), "targets": targets}

    def _lists(self, row: TokenizedRow) -> list[tuple[list[np.ndarray], np.ndarray]]:
        import numpy as np

        texts = row.texts()
        told = np.zeros(0, np.float32) if row.targets is None else row.targets
        if not self.task_type.endswith("reranker"):
            return [(texts, told)]
        random = np.random.RandomState(zlib.crc32(row.input_ids.tobytes()))
        positives, negatives = np.flatnonzero(told == 1), np.flatnonzero(told == 0)
        found = []
        for first in _drawn(random, positives, self.settings.max_positive_samples):
            chosen = [first, *_drawn(random, negatives, self.settings.max_negative_samples)]
            found.append(([texts[place] for place in chosen], told[chosen]))
        return found

    def _targets(self, told: list[np.ndarray]) -> torch.Tensor:
        import numpy as np
        import torch

        if self.task_type != "seq_cls":
            return torch.from_numpy(np.concatenate([np.zeros(0, np.float32), *told]))
        if self.problem == "single_label_classification":
            return torch.tensor([int(one[0]) for one in told], dtype=torch.int64)
        values = np.zeros((len(told), self.num_labels), np.float32)
        for number, one in enumerate(told):
            if self.problem == "regression":
                values[number] = one
            else:
                values[number, one.astype(np.int64)] = 1
        return torch.from_numpy(values)


def _drawn(random: Any, places: np.ndarray, most: int) -> list[int]:
    """All of a few places in their order, else as many as are wanted."""
    return [int(place) for place in (places if len(places) <= most else random.choice(places, most, replace=False))]


def pad(rows: Sequence[TokenizedRow], pad_token_id: int) -> Batch:
    """Pad rows on the right to the longest: ``input_ids``, ``attention_mask``, ``labels``, int64 (rows, length), and
    ``loss_scale`` float32 if any row has weights."""
    import numpy as np
    import torch

    shape = (len(rows), max(len(row.input_ids) for row in rows))
    arrays = {
        "input_ids": np.full(shape, pad_token_id, np.int64),
        "attention_mask": np.zeros(shape, np.int64),
        "labels": np.full(shape, -100, np.int64),
    }
    if any(row.loss_scale is not None for row in rows):
        arrays["loss_scale"] = np.zeros(shape, np.float32)
    for number, row in enumerate(rows):
        end = len(row.input_ids)
        arrays["input_ids"][number, :end] = row.input_ids
        arrays["attention_mask"][number, :end] = 1
        arrays["labels"][number, :end] = row.labels
        if "loss_scale" in arrays:
            arrays["loss_scale"][number, :end] = weights_of(row)
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def flatten(rows: Sequence[TokenizedRow]) -> Batch:
    """Join rows to one sequence that no attention crosses: ``input_ids``, ``labels``, ``position_ids`` int64
    (1, tokens), positions restarting with each row, and the bounds of the rows as variable-length attention wants
    them: ``cu_seq_lens_q``, ``cu_seq_lens_k`` int32 (rows + 1,), ``max_length_q``, ``max_length_k``; and as kernels of
    convolutions and states want them: ``seq_idx`` int32 (1, tokens), the number of each token's row."""
    import numpy as np
    import torch

    lengths = [len(row.input_ids) for row in rows]
    bounds = torch.from_numpy(np.cumsum([0, *lengths]).astype(np.int32))
    arrays = {
        "input_ids": np.concatenate([row.input_ids for row in rows]).astype(np.int64),
        "labels": np.concatenate([row.labels for row in rows]).astype(np.int64),
        "position_ids": np.concatenate([np.arange(length) for length in lengths]),
    }
    if any(row.loss_scale is not None for row in rows):
        arrays["loss_scale"] = np.concatenate([weights_of(row) for row in rows])
    batch: dict[str, Any] = {name: torch.from_numpy(array)[None] for name, array in arrays.items()}
    # The first token of a row is predicted by nothing: the last token of the row before must not learn it.
    batch["labels"][0, bounds[:-1].long()] = -100
    longest = max(lengths)
    batch |= {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}
    batch["seq_idx"] = torch.repeat_interleave(torch.arange(len(rows), dtype=torch.int32), torch.tensor(lengths))[None]
    return batch


def weights_of(row: TokenizedRow) -> np.ndarray:
    """The training weight of each token, float32."""
    import numpy as np

    return row.loss_scale if row.loss_scale is not None else (row.labels != -100).astype(np.float32)
