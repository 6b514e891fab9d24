"""``--to_cached_dataset``: the token rows of ``--dataset``, ready to train on."""

from __future__ import annotations

import os
from typing import Any

from rayswift.console import say
from rayswift.errors import UserError


def export_cached_dataset(args: Any) -> str:
    """Encode ``--dataset`` once; the folder for ``--cached_dataset``.

    Raises:
        UserError: the folder is there already, or data that cannot be read.
    """
    from rayswift import cluster
    from rayswift.data.flow.cache import TokenCache
    from rayswift.data.flow.export import save_cached_dataset
    from rayswift.data.flow.prepare import first_usable_row, load_train_data
    from rayswift.data.flow.stage_bars import StageBars
    from rayswift.data.names import resolve_datasets
    from rayswift.data.tokens.arrow_files import default_root
    from rayswift.data.tokens.encoder import Encoder
    from rayswift.hub import resolve_model
    from rayswift.modeling.task_models import settle_layout

    folder = str(cluster.results_folder(args, "output_dir", args.output_dir or "cached_dataset"))
    if os.path.exists(folder) and not args.exist_ok:
        raise UserError(f"--output_dir {folder}: exists already; name another, or --exist_ok true to write over it")
    model_dir = resolve_model(args.model, revision=args.model_revision, use_hf=args.use_hf, token=args.hub_token)
    settle_layout(args, model_dir)
    datasets = resolve_datasets(args)
    first_usable_row([*datasets.train, *datasets.val], args.strict)
    encoder = Encoder.for_training(args, model_dir)
    cluster.connect(args)
    with StageBars() as bars:
        cache = TokenCache(default_root(), args.load_from_cache_file)
        data = load_train_data(args, datasets, encoder, bars.update, cache)
    for line in data.drops.lines():
        say(line)
    assert data.train is not None
    save_cached_dataset(folder, data, encoder)
    held_out = len(data.val) if data.val else 0
    say(f"{len(data.train)} rows to train on, {held_out} to validate, encoded for {args.model}")
    return folder
