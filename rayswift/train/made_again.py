"""What a forward pass computes from what it keeps anyway is not kept: the backward pass makes it again, to the bit.

PyTorch's checkpointing does so for whole layers, which takes a third of a step. Here it is what costs a pass or two
over memory, and what the operation's own backward pass needs in any case.
"""

from __future__ import annotations

from typing import Any, cast
from weakref import WeakValueDictionary

import torch

from rayswift import private


class MadeAgain(torch.autograd.Function):
    """An operation whose result is not kept for those who read it, within :func:`made_again`."""

    @staticmethod
    def make(ctx: Any, *kept: Any) -> tuple[torch.Tensor, Any]:
        """The result and what else the backward pass uses, of the tensors that ``ctx`` saves."""
        raise NotImplementedError

    @classmethod
    def of(cls, *args: Any) -> torch.Tensor:
        """``apply``."""
        result: Any = cls.apply(*args)
        if result.grad_fn is not None:
            result.operation = cls
            _results[result.untyped_storage().data_ptr()] = result
        return cast(torch.Tensor, result)

    @classmethod
    def made(cls, ctx: Any) -> tuple[torch.Tensor, Any]:
        """What :meth:`make` gives; readers share it, until :meth:`take`."""
        if getattr(ctx, "made_before", None) is None:
            ctx.made_before = cls.make(ctx, *ctx.saved_tensors)
        return ctx.made_before

    @classmethod
    def take(cls, ctx: Any) -> Any:
        """For the operation's own backward pass, which comes after its readers': what :meth:`make` gives beside the
        result."""
        made, ctx.made_before = cls.made(ctx), None
        return made[1]


#: Living results, by where their values lie.
_results: WeakValueDictionary[int, torch.Tensor] = WeakValueDictionary()


def made_again() -> Any:
    """A block whose operations keep the results of others by how they are made."""
    return torch.autograd.graph.saved_tensors_hooks(_keep, _find)


def _keep(tensor: torch.Tensor) -> Any:
    result: Any = _results.get(tensor.untyped_storage().data_ptr())
    if result is None or private.may_have_changed(result) or result.dtype != tensor.dtype:
        return tensor
    return result.operation, result.grad_fn, tensor.shape, tensor.stride(), tensor.storage_offset()


def _find(kept: Any) -> torch.Tensor:
    if isinstance(kept, torch.Tensor):
        return kept
    operation, ctx, *place = kept
    return operation.made(ctx)[0].as_strided(*place)
