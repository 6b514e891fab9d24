"""Answer with Transformers in this process: batches, and one conversation as a stream of text.

The model runs in `continuous_batching`, as behind ``rayswift deploy``.

Prompts are the ids of training (``rayswift.data.tokens.encoder``), so a fine-tuned model is asked as it was taught.
"""

from __future__ import annotations

import copy
import functools
import logging
import os
import queue
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rayswift.data.tokens.encoder import Encoder
from rayswift.errors import UserError, one_line
from rayswift.generate import continuous_batching
from rayswift.generate.constraints import GrammarCompiler
from rayswift.generate.continuous_batching import BASE, BatchRunner, TokenDelta, padded
from rayswift.generate.logprobs import logprob_entry
from rayswift.generate.text_stream import cut_at_stop_word
from rayswift.generate.token_choice import Sampling
from rayswift.generate.types import Answer, Messages, SamplingParams
from rayswift.modeling.adapters import load_adapter
from rayswift.modeling.loading import add_special_tokens, load_model, read_config, resolve_dtype, supports_bfloat16
from rayswift.modeling.positions import longest
from rayswift.modeling.resolved import ResolvedModel

logger = logging.getLogger("rayswift.generate.transformers")


@dataclass
class TransformersEngine:
    """A model in memory and the encoder of its prompts. Make one with :meth:`load`."""

    model: Any
    encoder: Encoder
    context_length: int
    last_stream: Answer = field(default_factory=Answer)  # counts of the latest stream(), filled when it ends

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
        auto_class: str = "AutoModelForCausalLM",
    ) -> TransformersEngine:
        """Load the model of ``encoder.model_dir``, and the adapter of ``adapter_dir`` on it.

        ``torch_dtype`` None is the model's own; without ``exact_dtype`` a bfloat16 that comes from the checkpoint's
        args.json gives way on a device that is slow in it (see :func:`resolve_dtype`). ``use_gpu`` None takes GPUs when
        there are any; a model goes over all visible ones if there are several. On CPU all cores that this process may
        use compute. ``auto_class``: Transformers' class for a model that makes something else than text.
        """
        import torch

        on_gpu = torch.cuda.is_available() if use_gpu is None else use_gpu
        if on_gpu and not torch.cuda.is_available():
            raise UserError("--use_gpu true: PyTorch sees no GPU here; leave the flag out or set it to false")
        options = dict(model_kwargs or {})
        spread = on_gpu and torch.cuda.device_count() > 1
        if spread:
            options.setdefault("device_map", "auto")
        if not on_gpu:
            torch.set_num_threads(len(os.sched_getaffinity(0)))
        if not exact_dtype and torch_dtype == "bfloat16" and not supports_bfloat16(on_gpu):
            torch_dtype = None
        model = load_model(
            encoder.model_dir,
            torch_dtype=resolve_dtype(torch_dtype, encoder.model_dir, on_gpu, training=False),
            attn_impl=attn_impl,
            trust_remote_code=encoder.trust_remote_code,
            device=None if spread else "cuda" if on_gpu else "cpu",
            model_kwargs=options,
            auto_class=auto_class,
        )
        if encoder.new_special_tokens:
            add_special_tokens(model, encoder.tokenizer, list(encoder.new_special_tokens))
        if adapter_dir is not None:
            model = load_adapter(model, adapter_dir)
        return cls(model.eval(), encoder, context_length(encoder, options))

    @functools.cached_property
    def grammars(self) -> GrammarCompiler:
        """What makes constraints for this model's answers."""
        return GrammarCompiler(self.encoder.tokenizer, self.vocabulary, self.stop_token_ids)

    @property
    def vocabulary(self) -> int:
        """Tokens that the model knows; some of them may be in no text."""
        return int(self.model.get_input_embeddings().weight.shape[0])

    # --- answers ------------------------------------------------------------------------------------------------

    def generate(
        self, conversations: Sequence[Messages], params: SamplingParams, tools: Sequence[Any] | None = None
    ) -> list[Answer]:
        """Answer several conversations in one batch, in their order.

        A conversation that cannot be answered (no prompt, too long, a failure in the model) gets an ``Answer`` with
        ``error``; the others are answered all the same. ``tools``: the tool definitions of each conversation.
        """
        answers = [Answer() for _ in conversations]
        prompts: dict[int, list[int]] = {}
        for index, messages in enumerate(conversations):
            try:
                prompts[index] = self.prompt_ids(messages, tools[index] if tools else None)
            except UserError as error:
                answers[index].error = str(error)
        answer = self._search if params.num_beams > 1 else self._answer
        for index, found in zip(prompts, answer(list(prompts.values()), params), strict=True):
            answers[index] = found
        return answers

    def prompt_ids(self, messages: Messages, tools: Any = None) -> list[int]:
        """Token ids of the prompt; UserError when it leaves no room for an answer."""
        ids = self.encoder.encode_prompt(messages, tools)
        if not ids:
            raise UserError("the prompt is empty")
        if len(ids) >= self.context_length:
            raise UserError(f"the prompt has {len(ids)} tokens, the context holds {self.context_length}")
        return ids

    def _answer(self, prompts: list[list[int]], params: SamplingParams) -> list[Answer]:
        deltas: list[list[TokenDelta]] = [[] for _ in prompts]
        rows = [self._sequence(prompt, params, took.append) for prompt, took in zip(prompts, deltas, strict=True)]
        BatchRunner(self).run(rows)
        answers = []
        for row, took in zip(rows, deltas, strict=True):
            if took[-1].error is not None:
                answers.append(Answer(num_prompt_tokens=len(row.prompt), error=took[-1].error))
                continue
            answer = self._answer_of(row.prompt, row.generated, params)
            if params.logprobs:
                answer.logprobs = self._logprobs([likely for delta in took for likely in delta.logprobs])
            answers.append(answer)
        return answers

    def _sequence(
        self, prompt: list[int], params: SamplingParams, emit: Callable[[TokenDelta], Any]
    ) -> continuous_batching.Sequence:
        """An answer to be generated. A model that was loaded with an adapter answers with it."""
        return continuous_batching.Sequence(
            self,
            prompt,
            self.sampling(params, len(prompt)),
            emit,
            adapter=next(iter(getattr(self.model, "peft_config", ())), BASE),
            stop_words=tuple(self._text_stop_words(params)),
        )

    def _search(self, prompts: list[list[int]], params: SamplingParams) -> list[Answer]:
        """Beam search, which Transformers does. A batch that fails is halved until the guilty prompt is alone."""
        import torch

        if not prompts:
            return []
        ids, mask = padded(prompts, self.pad_token_id)
        config = self.generation_config(params, ids.shape[1])
        config.stop_strings = self._text_stop_words(params) or None
        try:
            with torch.inference_mode():
                found = self.model.generate(
                    input_ids=ids.to(self.model.device),
                    attention_mask=mask.to(self.model.device),
                    generation_config=config,
                    tokenizer=self.encoder.tokenizer,
                )
        except (RuntimeError, ValueError, IndexError) as error:
            if len(prompts) == 1:
                return [Answer(num_prompt_tokens=len(prompts[0]), error=one_line(error))]
            logger.warning("a batch of %d prompts failed (%s): trying smaller ones", len(prompts), one_line(error))
            half = len(prompts) // 2
            return self._search(prompts[:half], params) + self._search(prompts[half:], params)
        generated = found[:, ids.shape[1] :].tolist()
        return [self._answer_of(prompt, row, params) for prompt, row in zip(prompts, generated, strict=True)]

    def _answer_of(self, prompt: list[int], generated: list[int], params: SamplingParams) -> Answer:
        """The text before what ends it, with the ``--response_prefix`` that stood in the prompt; the end counts."""
        ends = set(self.stop_token_ids)
        end = next((place for place, token in enumerate(generated) if token in ends), len(generated))
        text = cut_at_stop_word(self.decode(generated[:end]), self._text_stop_words(params))
        return Answer((self.encoder.response_prefix or "") + text, len(prompt), min(end + 1, len(generated)))

    def stream(self, messages: Messages, params: SamplingParams, tools: Any = None) -> Iterator[str]:
        """Answer one conversation; yields the text in pieces while the model generates.

        Closing the iterator (or an exception in the consumer, such as Ctrl-C) stops the model at its next token.
        Beam search cannot be streamed: the answer then comes in one piece.
        """
        prompt = self.prompt_ids(messages, tools)
        self.last_stream = answer = Answer(num_prompt_tokens=len(prompt))
        if params.num_beams > 1:
            self.last_stream = self._search([prompt], params)[0]
            yield self.last_stream.text
            return
        deltas: queue.SimpleQueue[TokenDelta] = queue.SimpleQueue()
        row, runner = self._sequence(prompt, params, deltas.put), BatchRunner(self)
        text, ended = self.encoder.response_prefix or "", False
        logprobs: list[list[tuple[int, float]]] = []
        try:
            runner.submit([row])
            if text:
                yield text
            while not ended:
                delta = deltas.get()
                if delta.error is not None:
                    raise RuntimeError(delta.error)
                answer.num_generated_tokens += len(delta.token_ids)
                text, ended = text + delta.text, delta.finish_reason is not None
                logprobs += delta.logprobs
                if delta.text:
                    yield delta.text
        finally:
            row.cancel()
            runner.close()
        answer.text, answer.logprobs = text, self._logprobs(logprobs) if params.logprobs else None

    def _logprobs(self, tokens: list[list[tuple[int, float]]]) -> dict[str, Any]:
        text = tokens[:-1] if tokens and tokens[-1][0][0] in self.stop_token_ids else tokens
        return {"content": [logprob_entry(self.encoder.tokenizer, likely) for likely in text]}

    # --- settings -----------------------------------------------------------------------------------------------

    def sampling(self, params: SamplingParams, prompt_length: int) -> Sampling:
        """How an answer to a prompt of this length is sampled: ``params``, else the model's generation config."""
        own, room = self.model.generation_config, self.context_length - prompt_length
        return Sampling(
            **params.resolved(vars(own)),
            min_p=own.min_p or 0.0,
            max_tokens=min(params.max_new_tokens or room, room),
            logprobs=(params.top_logprobs or 0) if params.logprobs else None,
            skip_special_tokens=False,  # a model may have been taught to write them
            stop_ids=frozenset(self.stop_token_ids),
        )

    def generation_config(self, params: SamplingParams, prompt_length: int) -> Any:
        """The model's generation config with ``params`` over it."""
        config = copy.deepcopy(self.model.generation_config)
        found, room = params.resolved(vars(config)), self.context_length - prompt_length
        config.do_sample = found["temperature"] > 0
        for name in ("temperature", "top_k", "top_p"):
            setattr(config, name, found[name] if config.do_sample else None)
        config.max_new_tokens, config.max_length = min(params.max_new_tokens or room, room), None
        config.repetition_penalty, config.num_beams = found["repetition_penalty"], params.num_beams
        config.eos_token_id, config.pad_token_id = self.stop_token_ids or None, self.pad_token_id
        return config

    @property
    def stop_token_ids(self) -> list[int]:
        """Token ids that end an answer: the template's and the model's."""
        own = self.model.generation_config.eos_token_id
        listed = [] if own is None else [own] if isinstance(own, int) else list(own)
        return list(dict.fromkeys([*self.encoder.eos_token_ids, *listed]))

    @property
    def pad_token_id(self) -> int:
        return next((id_ for id_ in (*self.stop_token_ids, self.encoder.tokenizer.pad_token_id) if id_ is not None), 0)

    def _text_stop_words(self, params: SamplingParams) -> list[str]:
        """Stop words that are not one token and so have to be looked for in the text."""
        ends = set(self.stop_token_ids)
        convert = self.encoder.tokenizer.convert_tokens_to_ids
        return [word for word in (*self.encoder.stop_words, *params.stop_words) if word and convert(word) not in ends]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of generated ids, special tokens included: a model may have been taught to write them."""
        return self.encoder.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def context_length(encoder: Encoder, positions: Mapping[str, Any]) -> int:
    """Tokens that prompt and answer may have together: ``--max_length``, else the model's positions, with what
    ``--rope_scaling`` and ``--max_model_len`` among ``positions`` make of them."""
    limits = [limit for limit in (encoder.max_length, longest(read_config(encoder.model_dir), positions)) if limit]
    return min(limits) if limits else min(encoder.tokenizer.model_max_length, 2**20)


def load_engine(model: ResolvedModel) -> TransformersEngine:
    """Find (or download) the model, merge the adapter if asked to, and load both into this process; set the seed."""
    model, seed = model.merged(), model.args.seed
    args, folder = model.args, model.folder()
    logger.info("loading %s%s", folder, f" with {model.adapter}" if model.adapter else "")
    engine = TransformersEngine.load(
        Encoder.from_args(args, folder),
        model.adapter,
        torch_dtype=args.torch_dtype,
        exact_dtype="torch_dtype" in args.given,
        attn_impl=args.attn_impl,
        use_gpu=args.use_gpu,
        model_kwargs=args.model_kwargs,
    )
    seed_everything(seed)
    return engine


def seed_everything(seed: int) -> None:
    """Make sampling repeatable: the same command gives the same answers on the same machine."""
    import torch

    random.seed(seed)
    torch.manual_seed(seed)
