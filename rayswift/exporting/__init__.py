"""``rayswift export``: what is made of a model or a dataset for later use.

In: :class:`~rayswift.arguments.ExportArguments`. Out: a folder, whose path is returned and printed.

``source.py`` finds model, adapter and settings; ``quantize.py`` (with ``calibration.py``, ``quantizers.py``),
``gguf_file.py``, ``ollama.py``, ``peft_format.py`` and ``extraction.py`` each make one kind of result; ``folder.py``
keeps results whole; ``publish.py`` and ``model_card.py`` push. Merging is :mod:`rayswift.modeling.merging`.
"""

from __future__ import annotations

import os
from typing import Any

from rayswift.cluster import results_folder
from rayswift.console import say
from rayswift.errors import UserError
from rayswift.private import in_ray_job


def export(args: Any) -> str:
    """Do what the flags ask for, one after the other: merge, then one conversion, then push; the last result's folder.

    Everything that can be refused is looked at first: folders, libraries, the hub's token.

    Raises:
        UserError: bad input, or a result that cannot be written.
    """
    if args.to_cached_dataset:
        from rayswift.exporting.cached import export_cached_dataset

        return _said(export_cached_dataset(args))
    from rayswift.exporting.source import find_source
    from rayswift.hub.push import Destination

    destination = Destination.from_args(args) if args.push_to_hub else None
    source = find_source(args)
    args = source.args
    _check_actions(args, source.name)
    if destination is not None:
        destination.check_token()
    done = source.adapter
    if args.merge_lora:
        done = _said(_merge(source))
    pushes_model = destination is not None and done is None and not args.to_peft_format
    if _converts(args) or pushes_model:
        model_dir = done or source.model_dir()
        done = _said(_convert(args, model_dir, source.name)) if _converts(args) else model_dir
    elif args.to_peft_format:
        done = _said(_to_adapter(source))
    assert done is not None
    if destination is not None:
        from rayswift.exporting.publish import publish

        say(f"pushed to {publish(done, destination, args.commit_message, source.checkpoint)}")
    return done


def _said(folder: str) -> str:
    say(f"exported to {folder}")
    return folder


def _converts(args: Any) -> bool:
    return bool(args.quant_method or args.to_gguf or args.to_ollama)


def _target(args: Any, name: str) -> str:
    """Where the result of the last step goes: ``--output_dir``, else beside the model, named after what was done."""
    name += "-merged" if args.merge_lora else ""
    if args.quant_method:
        from rayswift.exporting.quantize import suffix

        name += suffix(args)
    elif args.to_gguf:
        name += "-gguf"
    else:
        name += "-ollama" if args.to_ollama else "-peft" if args.to_peft_format else ""
    return str(results_folder(args, "output_dir", args.output_dir or name))


def _check_actions(args: Any, name: str) -> None:
    """Refuse what cannot end well before anything is downloaded, merged or computed."""
    if args.quant_method:
        from rayswift.exporting.quantizers import check_libraries

        check_libraries(args.quant_method)
    if args.quant_method and args.dataset:
        from rayswift.data.names import resolve_datasets

        resolve_datasets(args)
    if args.merge_lora:
        from rayswift.exporting.zero_shards import needs_gathering
        from rayswift.modeling.adapter_folder import check_adapter

        if not needs_gathering(args.adapters[0]):
            check_adapter(args.adapters[0])
    if _converts(args) or args.to_peft_format or (args.merge_lora and args.output_dir):
        from rayswift.exporting.folder import check_target

        check_target(_target(args, name), args.exist_ok)


def _merge(source: Any) -> str:
    """``--merge_lora true``: base model and adapter as one plain model."""
    from rayswift.exporting.folder import building, check_target
    from rayswift.exporting.zero_shards import gathered
    from rayswift.modeling.merging import merge_adapter

    args = source.args
    options = {
        "torch_dtype": args.torch_dtype if "torch_dtype" in args.given else None,
        "new_special_tokens": args.new_special_tokens,
        "positions": args.positions,
        "trust_remote_code": args.trust_remote_code,
    }
    given = None if _converts(args) else args.output_dir
    if given is None and not _converts(args) and in_ray_job():  # beside an adapter of the job's own folder it is lost
        given = f"{source.name}-merged"
    target = str(results_folder(args, "output_dir", given or f"{source.adapter}-merged"))
    with gathered(source.adapter) as adapter:
        if given is None and adapter == source.adapter:
            return merge_adapter(adapter, source.model_dir(), **options)  # one that is there and whole is reused
        check_target(target, args.exist_ok)
        with building(target) as folder:
            merge_adapter(adapter, source.model_dir(), folder, **options)
    return target


def _to_adapter(source: Any) -> str:
    """``--to_peft_format true``: of a SWIFT adapter, or of a merged model and its ``--base_model``."""
    args, target = source.args, _target(source.args, source.name)
    if source.adapter is not None:
        from rayswift.exporting.peft_format import to_peft_format

        return to_peft_format(source.adapter, target)
    from rayswift import hub
    from rayswift.arguments import read_saved_arguments
    from rayswift.exporting.extraction import ModelPair, extract_adapter

    rank = args.lora_rank or (read_saved_arguments(source.checkpoint) or {}).get("lora_rank")
    if not rank:
        raise UserError("--lora_rank: the model does not say the rank it was trained with; name one, such as 16")
    base = hub.resolve_model(args.base_model, use_hf=args.use_hf, token=args.hub_token)
    models = ModelPair(source.model_dir(), base, args.base_model, args.trust_remote_code)
    return extract_adapter(models, int(rank), target)


def _convert(args: Any, model_dir: str, name: str) -> str:
    """The one conversion that the flags ask for."""
    from rayswift.exporting.folder import building, check_target
    from rayswift.modeling.loading import read_config

    target = _target(args, name)
    if args.quant_method:
        from rayswift.exporting.quantize import quantize

        return quantize(args, model_dir, target)
    if args.to_gguf:
        from rayswift.exporting.gguf_file import check_convertible, file_name, write_gguf
        from rayswift.modeling.loading import parameter_counts

        check_convertible(model_dir)
        check_target(target, args.exist_ok, parameter_counts(model_dir).bytes)
    with building(target) as folder:
        weights = model_dir
        if args.to_gguf:
            weights = f"./{file_name(name, args.to_gguf)}"
            write_gguf(model_dir, os.path.join(folder, weights), args.to_gguf, os.path.basename(name))
        if args.to_ollama:
            from rayswift.data.tokens.encoder import Encoder
            from rayswift.exporting.ollama import LAPTOP_CONTEXT, modelfile

            encoder = Encoder.from_args(args, model_dir)
            longest = args.max_length or read_config(model_dir).get("max_position_embeddings")
            context = args.ollama_num_ctx or (longest and min(longest, LAPTOP_CONTEXT))
            with open(os.path.join(folder, "Modelfile"), "w", encoding="utf-8") as file:
                file.write(modelfile(encoder, weights, context))
    return target
