"""Which engine answers a command: the one behind ``--base_url``, an own deployment, or a model in this process."""

from __future__ import annotations

import contextlib
import logging
import random
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rayswift import hub
from rayswift.data.tokens.encoder import Encoder
from rayswift.generate.transformers import TransformersEngine
from rayswift.modeling.merging import merge_adapter

if TYPE_CHECKING:
    from rayswift.generate.endpoint import EndpointEngine

logger = logging.getLogger("rayswift.generate.sources")


@contextlib.contextmanager
def open_endpoint(args: Any, *, seed: int | None = None) -> Iterator[EndpointEngine]:
    """The endpoint of ``--base_url``, else one that is started for this command and stopped at its end.

    ``seed``: sent with each request; None leaves it to the server.

    Raises:
        UserError: the endpoint cannot be used, or the model cannot be served.
    """
    from rayswift.generate.endpoint import EndpointEngine

    if args.base_url:
        key = args.api_key[0] if isinstance(args.api_key, list) and args.api_key else args.api_key
        yield EndpointEngine.connect(
            args.base_url, model=args.model, api_key=key or None, seed=seed, system=args.system
        )
        return
    from rayswift.serve.running import running_deployment

    with running_deployment(args) as endpoint:
        yield EndpointEngine.connect(endpoint.base_url, model=endpoint.model, api_key=endpoint.api_key, seed=seed)


def load_engine(args: Any) -> TransformersEngine:
    """Find (or download) the model, merge the adapter if asked to, and load both into this process."""
    model_dir = hub.resolve_model(
        args.model or "", revision=args.model_revision, use_hf=args.use_hf, token=args.hub_token
    )
    adapter = args.adapters[0] if args.adapters else None
    new_special_tokens = args.new_special_tokens
    if args.merge_lora and adapter is not None:
        model_dir = merge_adapter(
            adapter, model_dir, torch_dtype=args.torch_dtype, new_special_tokens=new_special_tokens,
            trust_remote_code=args.trust_remote_code,
        )  # fmt: skip
        adapter = None
    logger.info("loading %s%s", model_dir, f" with {adapter}" if adapter else "")
    return TransformersEngine.load(
        Encoder.from_args(args, model_dir),
        adapter,
        torch_dtype=args.torch_dtype,
        exact_dtype="torch_dtype" in args.given,
        attn_impl=args.attn_impl,
        use_gpu=args.use_gpu,
        model_kwargs=args.model_kwargs,
    )


def seed_everything(seed: int) -> None:
    """Make sampling repeatable: the same command gives the same answers on the same machine."""
    import torch

    random.seed(seed)
    torch.manual_seed(seed)
