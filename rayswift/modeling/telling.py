"""What a model tells of texts, in training and afterwards: classes, vectors, scores (``--task_type``)."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from torch.nn import functional

from rayswift.arguments.tasks import TaskSettings
from rayswift.errors import UserError
from rayswift.modeling.task_models import is_classifier, pooled, pooling_of

Batch = dict[str, torch.Tensor]


class PooledHead:
    """The output layer of a decoder, which sees one vector a text. ``states``: those of the last forward pass.

    Args:
        layer: the model's output layer.
        gives_logits: whether it is applied to them; else nothing is computed.
        pooling: which tokens make the vector.
    """

    def __init__(self, layer: Any, gives_logits: bool, pooling: str) -> None:
        self.mask: torch.Tensor | None = None
        self.states: torch.Tensor | None = None
        self._gives_logits, self._pooling, self._logits = gives_logits, pooling, layer.forward
        layer.forward = self._forward

    def _forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if self.mask is None:
            return self._logits(hidden)
        self.states = pooled(hidden, self.mask, self._pooling)
        return self._logits(self.states[:, None]) if self._gives_logits else self.states[:, None]


class Teller:
    """What a model tells of texts: logits of ``seq_cls`` (texts, labels), vectors (texts, size), scores (texts,).

    Args:
        model: with or without an adapter.
        task: ``--task_type``.
        model_dir: the folder that says how vectors are pooled.
        tokenizer: knows the two answers of a judge.
    """

    def __init__(self, model: Any, task: str, model_dir: str, tokenizer: Any, settings: TaskSettings) -> None:
        self.task = task
        self.head: PooledHead | None = None
        self.pooling, self.is_normal = pooling_of(model_dir) if self.task == "embedding" else ("last", False)
        base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        layer = None if is_classifier(self.task) else base.get_output_embeddings()
        if layer is not None:
            self.head = PooledHead(layer, self.task == "generative_reranker", self.pooling)
        words = (settings.generative_reranker_positive_token, settings.generative_reranker_negative_token)
        self.answers = [tokenizer.convert_tokens_to_ids(word) for word in words]
        if self.task == "generative_reranker" and any(one in (None, tokenizer.unk_token_id) for one in self.answers):
            raise UserError(
                f"--task_type generative_reranker: the tokenizer has no token {' or '.join(words)}; name others in "
                "GENERATIVE_RERANKER_POSITIVE_TOKEN and GENERATIVE_RERANKER_NEGATIVE_TOKEN"
            )

    def __call__(self, model: Any, batch: Batch) -> torch.Tensor:
        """float32; ``model`` is the one that is called, wrapped as training wraps it."""
        mask = batch["attention_mask"]
        if self.head is not None:
            self.head.mask = mask
        try:
            output = model(input_ids=batch["input_ids"], attention_mask=mask)
        finally:
            if self.head is not None:
                self.head.mask = None
        if self.task == "embedding":
            states = pooled(output.last_hidden_state, mask, self.pooling) if self.head is None else self.head.states
            assert states is not None
            return functional.normalize(states.float(), dim=-1) if self.is_normal else states.float()
        logits = output.logits.float()
        if self.task == "generative_reranker":
            yes, no = self.answers
            return logits[:, 0, yes] - logits[:, 0, no]
        return logits[:, 0] if self.task == "reranker" else logits
