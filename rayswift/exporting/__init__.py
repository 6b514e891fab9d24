"""``rayswift export``: what is made of a model or a dataset for later use.

In: :class:`~rayswift.arguments.ExportArguments`. Out: a folder, whose path is returned and printed.
"""

from __future__ import annotations

import os
from typing import Any

from rayswift.errors import UserError

_NOT_BUILT = ("quant_method", "to_ollama", "to_peft_format", "push_to_hub")


def export(args: Any) -> str:
    """Do what the flags ask for; the folder with the result.

    Raises:
        UserError: bad input, or an action that is not built.
    """
    missing = [f"--{name}" for name in _NOT_BUILT if getattr(args, name)]
    if missing:
        raise UserError(f"{', '.join(missing)}: not built yet; --merge_lora and --to_cached_dataset are")
    if args.merge_lora and args.to_cached_dataset:
        raise UserError("--merge_lora and --to_cached_dataset: one at a time")
    done = _merge(args) if args.merge_lora else _cached_dataset(args)
    print(f"exported to {done}", flush=True)
    return done


def _merge(args: Any) -> str:
    """``--merge_lora true``: base model and adapter as one plain model."""
    from rayswift.hub import resolve_model
    from rayswift.modeling.merging import merge_adapter

    if len(args.adapters) != 1:
        raise UserError("--merge_lora true: give one adapter; merge several one after the other")
    adapter = resolve_model(args.adapters[0], use_hf=args.use_hf, token=args.hub_token)
    model_dir = resolve_model(args.model, revision=args.model_revision, use_hf=args.use_hf, token=args.hub_token)
    return merge_adapter(
        adapter,
        model_dir,
        args.output_dir,
        args.torch_dtype,
        new_special_tokens=args.new_special_tokens,
        trust_remote_code=args.trust_remote_code,
    )


def _cached_dataset(args: Any) -> str:
    """``--to_cached_dataset true``: the token rows of ``--dataset``, ready to train on."""
    import shutil

    from rayswift import cluster
    from rayswift.data.cached_dataset import save_cached_dataset
    from rayswift.data.encoding import Encoder
    from rayswift.data.pipeline import first_usable_row, load_train_data
    from rayswift.data.registry import resolve_datasets
    from rayswift.data.stage_bars import StageBars
    from rayswift.data.token_cache import TokenCache, default_root
    from rayswift.hub import resolve_model

    folder = os.path.abspath(os.path.expanduser(args.output_dir or "cached_dataset"))
    if os.path.exists(folder) and not args.exist_ok:
        raise UserError(f"--output_dir {folder}: exists already; name another, or --exist_ok true to write over it")
    model_dir = resolve_model(args.model, revision=args.model_revision, use_hf=args.use_hf, token=args.hub_token)
    datasets = resolve_datasets(args)
    first_usable_row([*datasets.train, *datasets.val], args.strict)
    encoder = Encoder.for_training(args, model_dir)
    cluster.connect(args)
    with StageBars() as bars:
        cache = TokenCache(default_root(), args.load_from_cache_file)
        data = load_train_data(args, datasets, encoder, bars.update, cache)
    for line in data.drops.lines():
        print(line)
    assert data.train is not None
    shutil.rmtree(folder, ignore_errors=True)
    save_cached_dataset(folder, data, encoder)
    held_out = len(data.val) if data.val else 0
    print(f"{len(data.train)} rows to train on, {held_out} to validate, encoded for {args.model}")
    return folder
