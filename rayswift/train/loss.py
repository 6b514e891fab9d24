"""Cross entropy at a model's output layer, without the logits of all positions.

Only trained positions are scored, in chunks whose logits take ``CHUNK_BYTES`` whatever the vocabulary is, and each
chunk's gradient is taken while its logits are there (as in Liger and cut cross entropy). Whether a model's loss is
this one is tried out before the first step (:func:`find_loss_head`); no list of architectures says so.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rayswift.errors import one_line

logger = logging.getLogger("rayswift.train.loss")

#: Memory of one chunk's logits in float32: large products keep a GPU busy; on CPUs the passes over them stay in the
#: cache, and glibc keeps what is freed (beyond 32 MiB it does not).
CHUNK_BYTES, CHUNK_BYTES_CPU = 64 * 2**20, 16 * 2**20
#: On CPUs, memory of the gradients that make one product.
GROUP_BYTES_CPU = 24 * 2**20


@dataclass
class Scored:
    """What a forward pass found: the summed loss (a float32 scalar with its gradient), and how many trained tokens
    were the likeliest (int64)."""

    loss: torch.Tensor
    right: torch.Tensor


@dataclass(frozen=True)
class _Bend:
    """What a model does to its output layer's values: ``cap · tanh(scale · values / cap)``, or without a cap
    ``scale · values``."""

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, values: torch.Tensor) -> torch.Tensor:
        values = values if self.scale == 1 else values * self.scale
        return values if self.cap is None else self.cap * torch.tanh(values / self.cap)

    def backward(self, gradient: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        if self.cap is not None:
            gradient = gradient * (1 - (logits / self.cap) ** 2)
        return gradient if self.scale == 1 else gradient * self.scale


class LossHead:
    """The output layer of a model, which scores labels instead of giving logits while :meth:`scoring` says so.

    Args:
        layer: the model's output layer.
        bend: what the model does to its values.
        label_smoothing: the share of each target that is spread over the vocabulary.
    """

    def __init__(self, layer: nn.Linear, bend: _Bend, label_smoothing: float = 0.0) -> None:
        self.label_smoothing = label_smoothing
        self._bend = bend
        self._scoring: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, float, list[Scored]] | None = None
        self._layer, self._logits = layer, layer.forward
        layer.forward = self._forward  # type: ignore[assignment]

    def remove(self) -> None:
        """Leave the layer as it was."""
        del self._layer.forward

    @contextmanager
    def scoring(
        self,
        labels: torch.Tensor,
        weights: torch.Tensor | None = None,
        smoothing: float | None = None,
        places: torch.Tensor | None = None,
    ) -> Iterator[list[Scored]]:
        """Forward passes inside score ``labels`` (int64 (rows, length), −100 where not trained; position t is
        predicted at t − 1), each token's loss times its weight (float (rows, length)). What they found is in the
        list when the block ends; logits of theirs are zeros of one position. ``smoothing``: instead of
        ``label_smoothing``. ``places``: :func:`trained_places` of the labels, found on the host."""
        found: list[Scored] = []
        places = trained_places(labels) if places is None else places
        self._scoring = labels, places, weights, self.label_smoothing if smoothing is None else smoothing, found
        try:
            yield found
        finally:
            self._scoring = None

    def _forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if self._scoring is None:
            return self._logits(hidden)
        labels, places, weights, smoothing, found = self._scoring
        layer = self._layer
        loss, right = _HeadLoss.apply(
            hidden.flatten(0, 1).index_select(0, places - 1),
            layer.weight,
            layer.bias,
            labels.flatten().index_select(0, places),
            None if weights is None else weights.flatten().index_select(0, places).float(),
            self._bend,
            smoothing,
        )
        found.append(Scored(loss, right))
        return hidden.new_zeros(len(hidden), 1, layer.out_features)


def trained_places(labels: torch.Tensor) -> torch.Tensor:
    """Where trained labels stand in ``labels.flatten()``, int64 (tokens,). A device would have the host wait here."""
    trained = labels != -100
    trained[:, 0] = False
    return trained.flatten().nonzero()[:, 0]


class _HeadLoss(torch.autograd.Function):
    """Summed cross entropy of ``bend(hidden @ weight.T + bias)`` (tokens, vocabulary) against ``targets`` (tokens,)."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        token_weights: torch.Tensor | None,
        bend: _Bend,
        smoothing: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        device, vocabulary = hidden.device, weight.shape[0]
        for_hidden, for_weight, for_bias = ctx.needs_input_grad[:3]
        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else weight.dtype
        inputs, matrix = hidden.to(dtype), weight.to(dtype)
        grad_hidden = torch.empty_like(hidden) if for_hidden else None
        grad_bias = torch.zeros(weight.shape[0], dtype=torch.float32, device=device) if for_bias else None
        grad_weight: torch.Tensor | None = None
        loss = torch.zeros((), dtype=torch.float32, device=device)
        right = torch.zeros((), dtype=torch.int64, device=device)
        size = max((CHUNK_BYTES_CPU if device.type == "cpu" else CHUNK_BYTES) // (4 * vocabulary), 16)
        # The gradients of a group of tokens make one product. A sum into the weight's gradient passes over all of it:
        # one for as many tokens as a state has values is little beside the product, and their gradients take no more
        # memory than the weight's. Without it a CPU multiplies some chunks at once a quarter faster than each.
        group = hidden.shape[-1] if for_weight else size
        if device.type == "cpu" and not for_weight:
            group = max(GROUP_BYTES_CPU // (dtype.itemsize * vocabulary) // size, 1) * size
        for begin in range(0, len(targets), group):
            end = min(begin + group, len(targets))
            kept = (
                torch.empty(end - begin, vocabulary, dtype=dtype, device=device) if for_hidden or for_weight else None
            )
            for start in range(begin, end, size):
                part = slice(start, min(start + size, end))
                wanted = targets[part, None]
                values = inputs[part] @ matrix.t()
                logits = bend((values if bias is None else values + bias).float())
                likeliest = logits.argmax(-1, keepdim=True)
                right += (likeliest == wanted).sum()
                gradient = torch.softmax(logits, -1)
                normaliser = logits.gather(1, likeliest) - gradient.gather(1, likeliest).log()
                losses = (normaliser - (1 - smoothing) * logits.gather(1, wanted))[:, 0]
                if smoothing:
                    losses -= smoothing * logits.mean(-1)
                weights = None if token_weights is None else token_weights[part]
                loss += (losses if weights is None else losses * weights).sum()
                if kept is None and grad_bias is None:
                    continue
                gradient.scatter_add_(1, wanted, torch.full_like(wanted, smoothing - 1, dtype=gradient.dtype))
                if smoothing:
                    gradient -= smoothing / vocabulary
                if weights is not None:
                    gradient *= weights[:, None]
                gradient = bend.backward(gradient, logits)
                if kept is not None:
                    kept[part.start - begin : part.stop - begin] = gradient
                if grad_bias is not None:
                    grad_bias += gradient.sum(0)
            if kept is not None and grad_hidden is not None:
                grad_hidden[begin:end] = kept @ matrix
            if kept is not None and for_weight:
                of_group = kept.t() @ inputs[begin:end]
                grad_weight = of_group.float() if grad_weight is None else grad_weight.add_(of_group)
        if for_weight and grad_weight is None:  # no token is trained
            grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=device)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        ctx.mark_non_differentiable(right)
        return loss, right

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        of_inputs = (
            None if saved is None else (saved * grads[0]).to(dtype)
            for saved, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return (*of_inputs, None, None, None, None)


def find_loss_head(model: Any, label_smoothing: float = 0.0) -> LossHead | None:
    """The model's output layer as a :class:`LossHead`, tried on a few tokens against the model's own loss.

    None where they differ: the layer is not a plain one (an adapter on it), it is not what makes the logits, the loss
    has further parts (of experts), or the model takes more than token ids.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    layer = base.get_output_embeddings()
    if type(layer) is not nn.Linear:
        return None
    random, training = torch.Generator().manual_seed(0), model.training
    input_ids = torch.randint(layer.out_features, (2, 8), generator=random).to(layer.weight.device)
    values: list[torch.Tensor] = []
    hook = layer.register_forward_hook(lambda _module, _inputs, output: values.append(output))
    head = None
    try:
        model.eval()
        with torch.no_grad():
            own = model(input_ids=input_ids, labels=input_ids)
            bend = _find_bend(values[0].float(), own.logits.float(), base.config)
            if bend is None:
                return None
            head = LossHead(layer, bend)
            with head.scoring(input_ids) as found:
                model(input_ids=input_ids)
        mean = found[0].loss / (input_ids.numel() - len(input_ids))
        if not torch.allclose(mean, own.loss.float(), rtol=1e-5 if own.logits.dtype == torch.float32 else 1e-2):
            head.remove()
            return None
    except Exception as error:  # whatever a model's code does: it trains with its own loss
        logger.debug("the loss of %s is its own: %s", type(base).__name__, one_line(error))
        if head is not None:
            head.remove()
        return None
    finally:
        hook.remove()
        model.train(training)
    head.label_smoothing = label_smoothing
    return head


def _find_bend(values: torch.Tensor, logits: torch.Tensor, config: Any) -> _Bend | None:
    """What leads from the output layer's values to the model's logits; None where it is something else."""
    cap = getattr(config.get_text_config(), "final_logit_softcapping", None)
    scaled = logits if cap is None else cap * torch.atanh((logits / cap).double()).float()
    ratio = float((scaled * values).sum() / (values * values).sum())
    scale = 1.0 if abs(ratio - 1) < 1e-3 else ratio
    bend = _Bend(scale, cap)
    close = torch.allclose(bend(values), logits, rtol=1e-2, atol=1e-2 * float(logits.abs().max()))
    return bend if close else None
