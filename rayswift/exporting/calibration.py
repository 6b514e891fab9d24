"""Calibration rows for GPTQ and AWQ: token ids of ``--dataset``, through the data path that training uses."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np

from rayswift.data.flow.cache import TokenCache
from rayswift.data.flow.prepare import first_usable_row, load_train_data
from rayswift.data.flow.stage_bars import StageBars
from rayswift.data.names import resolve_datasets
from rayswift.data.tokens.arrow_files import default_root
from rayswift.data.tokens.encoder import Encoder
from rayswift.data.tokens.table import TokenRows
from rayswift.errors import UserError

#: Tokens of a row where ``--max_length`` is not given: longer ones cost memory and change little.
MAX_LENGTH = 2048
#: Shorter rows say nothing about the weights; GPTQModel drops them too.
MIN_LENGTH = 10


def calibration_rows(args: Any, model_dir: str) -> list[np.ndarray]:
    """The token ids of the first ``--quant_n_samples`` rows, as ``--dataset_shuffle`` orders them; needs Ray.

    Raises:
        UserError: a dataset that cannot be read, or no row that is long enough.
    """
    settings = copy.copy(args)
    settings.split_dataset_ratio, settings.streaming = 0.0, False
    settings.val_dataset = settings.cached_val_dataset = []
    settings.new_special_tokens = []  # the model's tokenizer has its own
    if "truncation_strategy" not in args.given:
        settings.truncation_strategy = "right"  # the start of a long row calibrates as well
    encoder = Encoder.from_args(settings, model_dir, max_length=MAX_LENGTH)
    datasets = resolve_datasets(settings)
    first_usable_row(datasets.train, settings.strict)
    with StageBars() as bars:
        cache = TokenCache(default_root(), settings.load_from_cache_file)
        data = load_train_data(settings, datasets, encoder, bars.update, cache)
    assert data.train is not None
    tokens = TokenRows(data.train)
    rows: list[np.ndarray] = []
    for number in range(len(tokens)):
        ids = np.asarray(tokens[number].input_ids)
        if len(ids) >= MIN_LENGTH:
            rows.append(ids)
        if len(rows) == args.quant_n_samples:
            break
    if not rows:
        raise UserError(f"--dataset {' '.join(args.dataset)}: no row of {MIN_LENGTH} tokens or more to calibrate with")
    return rows
