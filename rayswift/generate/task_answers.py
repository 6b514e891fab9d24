"""What a trained model tells of texts, with Transformers in this process: classes, vectors, scores (``--task_type``).

Texts are laid out as in training, so a model is asked as it was taught.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from rayswift.arguments.tasks import TaskSettings
from rayswift.cluster import address_of
from rayswift.data.chat.conversation import DropRow
from rayswift.data.tokens.encoder import Encoder
from rayswift.data.tokens.task_rows import text_ids
from rayswift.errors import UserError, one_line
from rayswift.generate.types import Answer, AnswerSource, Request
from rayswift.modeling.adapters import load_adapter
from rayswift.modeling.loading import load_tokenizer, read_config, resolve_dtype, supports_bfloat16
from rayswift.modeling.task_models import classes_of_adapter, is_classifier, load_task_model, settle_layout
from rayswift.modeling.telling import Teller

if TYPE_CHECKING:
    import numpy as np
    import torch

    from rayswift.generate.sources import AnswerJob

logger = logging.getLogger("rayswift.generate.task_answers")

#: Texts that are computed together.
BATCH = 32


def task_encoder(encoder: Encoder) -> Encoder:
    """The encoder as texts of its task are laid out."""
    if encoder.task_type == "generative_reranker" and encoder.enable_thinking is None:
        return replace(encoder, enable_thinking=False)  # the judge answers at once
    return encoder


def ids_of_text(encoder: Encoder, row: Mapping[str, Any]) -> np.ndarray:
    """The token ids of one text, a row of messages. Raises UserError for one that cannot be laid out."""
    messages = row["messages"]
    if encoder.task_type.endswith("reranker") and (len(messages) < 2 or messages[-1]["role"] != "assistant"):
        raise UserError("a document is judged behind a query: messages of user and assistant")
    try:
        return text_ids(encoder, [dict(row)])[0]
    except DropRow as refused:
        raise UserError(refused.reason) from None


@dataclass
class TaskEngine:
    """A model in memory and the encoder of its texts. Make one with :meth:`load`."""

    model: Any
    encoder: Encoder
    context_length: int
    teller: Teller
    pad_token_id: int

    @classmethod
    def load(
        cls,
        encoder: Encoder,
        adapter_dir: str | None = None,
        *,
        torch_dtype: str | None = None,
        exact_dtype: bool = True,
        attn_impl: str | None = None,
        use_gpu: bool | None = None,
        model_kwargs: dict[str, Any] | None = None,
    ) -> TaskEngine:
        """Load the model of ``encoder.model_dir`` for the task of ``encoder``; the rest as for ``TransformersEngine``.

        Raises:
            UserError: it cannot be loaded; or has no head for the task, and no adapter brings one.
        """
        import torch

        folder, on_gpu = encoder.model_dir, torch.cuda.is_available() if use_gpu is None else use_gpu
        if not exact_dtype and torch_dtype == "bfloat16" and not supports_bfloat16(on_gpu):
            torch_dtype = None
        config = read_config(folder)
        trained = str((config.get("architectures") or [""])[0]).endswith("ForSequenceClassification")
        if is_classifier(encoder.task_type) and adapter_dir is None and not trained:
            raise UserError(f"--model {folder}: has no head for --task_type {encoder.task_type}; train one first")
        labels = None if adapter_dir is None else classes_of_adapter(adapter_dir) or encoder.num_labels
        if trained:
            labels = len(config.get("id2label") or {0: "", 1: ""})
        tokenizer = load_tokenizer(folder, trust_remote_code=encoder.trust_remote_code)
        model = load_task_model(
            folder, encoder.task_type, labels, encoder.problem_type, tokenizer,
            torch_dtype=resolve_dtype(torch_dtype, folder, on_gpu, training=False), attn_impl=attn_impl,
            trust_remote_code=encoder.trust_remote_code, device="cuda" if on_gpu else "cpu",
            model_kwargs=model_kwargs or {},
        )  # fmt: skip
        if adapter_dir is not None:
            model = load_adapter(model, adapter_dir)
        encoder = task_encoder(encoder)
        teller = Teller(model, encoder.task_type, folder, tokenizer, TaskSettings.from_environment())
        longest = encoder.max_length or config.get("max_position_embeddings") or 2**20
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        return cls(model.eval(), encoder, longest, teller, pad)

    def tell(self, texts: Sequence[np.ndarray]) -> list[torch.Tensor]:
        """What the model tells of each text, float32 on the CPU: a vector, logits, or one score before the sigmoid."""
        import torch
        from torch.nn.utils.rnn import pad_sequence

        order = sorted(range(len(texts)), key=lambda place: len(texts[place]))  # little padding
        found: dict[int, torch.Tensor] = {}
        for start in range(0, len(order), BATCH):
            places = order[start : start + BATCH]
            ids = [torch.as_tensor(texts[place], dtype=torch.int64) for place in places]
            mask = pad_sequence([torch.ones_like(one) for one in ids], batch_first=True)
            padded = pad_sequence(ids, batch_first=True, padding_value=self.pad_token_id)
            batch = {"input_ids": padded.to(self.model.device), "attention_mask": mask.to(self.model.device)}
            with torch.inference_mode():
                found |= dict(zip(places, self.teller(self.model, batch).cpu(), strict=True))
        return [found[place] for place in range(len(texts))]

    def answer(self, rows: Sequence[Mapping[str, Any]]) -> list[Answer]:
        """SWIFT's responses: a class, classes or numbers; a vector; a score between 0 and 1. A row that cannot be read
        has an ``error``."""
        answers, texts = [Answer() for _ in rows], {}
        for place, row in enumerate(rows):
            try:
                ids = ids_of_text(self.encoder, row)
                if not 0 < len(ids) <= self.context_length:
                    raise UserError(f"the text has {len(ids)} tokens, the context holds {self.context_length}")
                texts[place] = ids
                answers[place].num_prompt_tokens = len(ids)
            except UserError as error:
                answers[place].error = str(error)
        for place, told in zip(texts, self.tell(list(texts.values())), strict=True):
            answers[place].told = self._response(told)
        return answers

    def _response(self, told: torch.Tensor) -> Any:
        encoder = self.encoder
        if encoder.task_type == "embedding":
            return told.tolist()
        if encoder.task_type != "seq_cls":
            return float(told.sigmoid())
        problem = getattr(self.model.config, "problem_type", None) or encoder.problem
        if problem == "single_label_classification":
            return int(told.argmax())
        if problem == "multi_label_classification":
            return (told >= 0).nonzero().flatten().tolist()
        return float(told[0]) if len(told) == 1 else told.tolist()


@contextlib.contextmanager
def open_task_answers(job: AnswerJob) -> Iterator[AnswerSource]:
    """What answers the rows of a model that tells numbers.

    Raises:
        UserError: a flag asks for what only models of text have.
    """
    assert job.model is not None
    args, name = job.args, f"--task_type {job.args.task_type}"
    if args.infer_backend != "transformers":
        raise UserError(f"{name}: infer answers with --infer_backend transformers; rayswift deploy serves it with vLLM")
    if args.num_workers or address_of(args):
        raise UserError(f"{name}: rows are read in this process; leave --num_workers and --address out")
    if args.stream:
        raise UserError(f"{name}: numbers are no stream; leave --stream out")
    model = job.model.merged()
    folder = model.folder()
    settle_layout(model.args, folder)
    engine = TaskEngine.load(
        Encoder.from_args(model.args, folder), model.adapter, torch_dtype=args.torch_dtype,
        exact_dtype="torch_dtype" in args.given, attn_impl=args.attn_impl, use_gpu=args.use_gpu,
        model_kwargs=args.model_kwargs,
    )  # fmt: skip

    def answers(requests: Sequence[Request]) -> Iterator[tuple[int, Answer]]:
        for first in range(0, len(requests), BATCH):
            batch = requests[first : first + BATCH]
            try:
                found = engine.answer([one.row for one in batch])
            except RuntimeError as error:
                found = [Answer(error=one_line(error)) for _ in batch]
            yield from zip((one.numbers[0] for one in batch), found, strict=True)

    yield answers
