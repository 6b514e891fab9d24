"""``rayswift infer``: a conversation in the terminal, or answers to the rows of ``--val_dataset``."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import random
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from rayswift import hub
from rayswift.arguments import read_saved_arguments
from rayswift.data.encoding import Encoder
from rayswift.data.registry import resolve_dataset_files
from rayswift.data.rows import WARNINGS, Drop, standardise_rows
from rayswift.data.sources import iter_raw_rows, locate
from rayswift.errors import UserError
from rayswift.modeling.adapters import ADAPTER_CONFIG, check_adapter
from rayswift.modeling.merging import merge_adapter
from rayswift.serve.chat import RULE, chat
from rayswift.serve.generation import Answer, GenerationSettings
from rayswift.serve.transformers_engine import TransformersEngine

if TYPE_CHECKING:
    from rayswift.arguments import InferArguments

logger = logging.getLogger("rayswift.serve.infer")

Row = dict[str, Any]
BAD_ROW = "error"  # key of a row that could not be read or answered: why


def infer(args: InferArguments) -> list[Row] | None:
    """Answer the rows of ``--val_dataset`` (or ``--dataset``) and return the result rows; without one, chat.

    ``--adapters CKPT`` is enough: model, template, system and dtype come from the checkpoint's ``args.json``.
    The result file has SWIFT's rows: ``response, labels, logprobs, messages, dataset, …``; a row that cannot be
    answered has an ``error`` beside an empty response and never stops the others.

    Raises:
        UserError: a model, checkpoint or dataset that cannot be read, a result file that cannot be written.
    """
    if args.infer_backend != "transformers":
        raise UserError(f"--infer_backend {args.infer_backend}: not built yet; use --infer_backend transformers")
    args = with_checkpoint(args)
    if args.metric == "rouge":
        raise UserError("--metric rouge: not built yet; use --metric acc")
    rows = read_rows(args) if args.val_dataset or args.dataset else None
    with contextlib.ExitStack() as stack:
        # Opened before the model loads: a path that cannot be written must not cost the answers.
        file = stack.enter_context(open_results(result_path(args))) if rows is not None else None
        engine = load_engine(args)
        seed_everything(args.seed)
        settings = GenerationSettings.from_arguments(args)
        if rows is None or file is None:
            chat(engine, settings, stream=args.stream is not False)
            return None
        return answer_rows(engine, settings, rows, file, args)


def with_checkpoint(args: InferArguments) -> InferArguments:
    """Complete ``args`` from the ``args.json`` of the adapter, or of a full checkpoint given as ``--model``."""
    if len(args.adapters) > 1:
        raise UserError("--adapters: rayswift infer takes one adapter; merge them one after the other first")
    where = args.adapters[0] if args.adapters else args.model
    if where is None:
        raise UserError("--model or --adapters is needed: which model should answer?")
    if args.adapters:
        adapter = hub.resolve_adapter(where, use_hf=args.use_hf, token=args.hub_token)
        check_adapter(adapter)
        args.adapters = [adapter]
        where = adapter
    saved = read_saved_arguments(where) if os.path.isdir(where) else None
    if saved is not None:
        args = args.with_saved(saved)
    if args.model is None:
        args.model = base_model_of(where)
    return args


def base_model_of(adapter_dir: str) -> str:
    """The base model that PEFT noted in an adapter without ``args.json``."""
    config = json.loads((Path(adapter_dir) / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    model = config.get("base_model_name_or_path")
    if not model:
        raise UserError(f"--adapters {adapter_dir}: does not say which model it belongs to; add --model")
    return str(model)


def load_engine(args: InferArguments) -> TransformersEngine:
    """Find (or download) the model, merge the adapter if asked to, and load both."""
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


# --- rows in ----------------------------------------------------------------------------------------------------


def read_rows(args: InferArguments) -> list[Row]:
    """The standard rows of ``--val_dataset`` (else ``--dataset``), each with its dataset's name as ``dataset``.

    ``NAME#N`` takes the first N rows, ``--val_dataset_sample`` the first N of all; with ``--val_dataset_shuffle true``
    N random ones (``--data_seed``). A row that is no conversation becomes ``{"error": why, "dataset": …}``, or with
    ``--strict true`` a UserError that names file and line.
    """
    rows: list[Row] = []
    flag = "--val_dataset" if args.val_dataset else "--dataset"
    for text in args.val_dataset or args.dataset:
        try:
            resolved = resolve_dataset_files(text, args)
        except UserError as error:  # it speaks of --dataset whichever flag named the data
            raise UserError(str(error).replace("--dataset", flag, 1)) from None
        found = dataset_rows(resolved, args.strict)
        rows += take(found, resolved.spec.num_samples, args)
    if not rows:
        raise UserError(f"{flag} {' '.join(args.val_dataset or args.dataset)}: no rows in it")
    return take(rows, args.val_dataset_sample, args)


def dataset_rows(resolved: Any, strict: bool) -> Iterator[Row]:
    """Standard rows of one dataset, bad ones as ``{"error": …}``."""
    for raw, path, position in iter_raw_rows(resolved.files):
        for row in standardise_rows(raw, resolved.rules):
            if isinstance(row, Drop):
                where = locate(path, position)
                if strict:
                    raise UserError(f"{where}: {row.reason} (--strict true stops at the first bad row)")
                row = {"messages": [], BAD_ROW: f"{where}: {row.reason}"}
            row.pop(WARNINGS, None)
            yield row | {"dataset": resolved.spec.name}


def take(rows: Iterable[Row], count: int | None, args: InferArguments) -> list[Row]:
    """The first ``count`` rows (None: all), of the shuffled rows with ``--val_dataset_shuffle true``."""
    if args.val_dataset_shuffle:
        rows = list(rows)
        random.Random(args.data_seed).shuffle(rows)
    return list(itertools.islice(rows, count))


# --- answers out ------------------------------------------------------------------------------------------------


def result_path(args: InferArguments) -> Path:
    """``--result_path``, else ``<checkpoint>/infer_result/<date>.jsonl``, else the same below ``result/<model>``."""
    if args.result_path:
        return Path(args.result_path).expanduser()
    checkpoint = Path(args.adapters[0] if args.adapters else args.model or "")
    if not args.adapters and not (checkpoint / "args.json").is_file():
        checkpoint = Path("result", args.model_suffix)
    return checkpoint / "infer_result" / f"{time.strftime('%Y%m%d-%H%M%S')}.jsonl"


def open_results(path: Path) -> TextIO:
    """Open the result file for appending; its folder is made."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("a", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--result_path {path}: cannot be written ({error.strerror or error})") from None


def answer_rows(
    engine: TransformersEngine, settings: GenerationSettings, rows: list[Row], file: TextIO, args: InferArguments
) -> list[Row]:
    """Answer ``rows`` batch by batch; each batch is in the file as soon as it is answered."""
    from tqdm.auto import tqdm

    size = 1 if args.stream else len(rows) if args.max_batch_size == -1 else max(args.max_batch_size, 1)
    results: list[Row] = []
    prompt_tokens = generated_tokens = 0
    start = time.monotonic()
    with tqdm(total=len(rows), desc="infer", unit="row", disable=bool(args.stream)) as bar:
        for first in range(0, len(rows), size):
            batch = rows[first : first + size]
            for row, answer in zip(batch, answer_batch(engine, settings, batch, bool(args.stream)), strict=True):
                results.append(result_row(row, answer))
                file.write(json.dumps(results[-1], ensure_ascii=False) + "\n")
                prompt_tokens += answer.num_prompt_tokens
                generated_tokens += answer.num_generated_tokens
            file.flush()
            bar.update(len(batch))
    runtime = time.monotonic() - start
    report(results, file.name, args.metric, {
        "num_prompt_tokens": prompt_tokens,
        "num_generated_tokens": generated_tokens,
        "num_samples": len(results),
        "runtime": round(runtime, 4),
        "samples/s": round(len(results) / runtime, 4),
        "tokens/s": round(generated_tokens / runtime, 4),
    })  # fmt: skip
    return results


def answer_batch(
    engine: TransformersEngine, settings: GenerationSettings, batch: list[Row], stream: bool
) -> list[Answer]:
    """Answer the rows of one batch; rows that could not be read pass through as errors."""
    answers = [Answer(error=row.get(BAD_ROW)) for row in batch]
    good = [index for index, row in enumerate(batch) if BAD_ROW not in row]
    prompts = [split_reference(batch[index]["messages"])[0] for index in good]
    tools = [batch[index].get("tools") for index in good]
    if stream and good:
        answers[0] = stream_answer(engine, settings, prompts[0], tools[0])
    else:
        for index, answer in zip(good, engine.generate(prompts, settings, tools), strict=True):
            answers[index] = answer
    return answers


def stream_answer(engine: TransformersEngine, settings: GenerationSettings, messages: Any, tools: Any) -> Answer:
    """Answer one row and show it in the terminal as it comes (``--stream true`` over a dataset)."""
    sys.stdout.write(f"[QUERY] {messages[-1]['content'] if messages else ''}\n[RESPONSE] ")
    try:
        for piece in engine.stream(messages, settings, tools):
            sys.stdout.write(piece)
            sys.stdout.flush()
    except (UserError, RuntimeError, ValueError, IndexError) as error:
        return Answer(error=str(error))
    finally:
        sys.stdout.write(f"\n{RULE}\n")
    return engine.last_stream


def split_reference(messages: list[Row]) -> tuple[list[Row], str | None]:
    """The messages to answer, and the reference answer that stood at their end (None where there is none)."""
    if messages and messages[-1]["role"] == "assistant":
        return messages[:-1], messages[-1]["content"]
    return messages, None


def result_row(row: Row, answer: Answer) -> Row:
    """One row of the result file (SWIFT's keys in SWIFT's order, then the row's other columns)."""
    messages, labels = split_reference(row["messages"])
    if answer.error is None:
        messages = [*messages, {"role": "assistant", "content": answer.text}]
    result = {"response": answer.text, "labels": labels, "logprobs": answer.logprobs, "messages": messages}
    result |= {key: value for key, value in row.items() if key not in result and key != BAD_ROW}
    return result if answer.error is None else result | {BAD_ROW: answer.error}


def report(results: list[Row], path: str, metric: str | None, statistics: Row) -> None:
    """Print what was done: the score asked for, SWIFT's line of statistics, failures, and where the answers are."""
    failed = [row for row in results if BAD_ROW in row]
    if metric == "acc":
        print({"acc": exact_match(results)})
    print(statistics)
    if failed:
        logger.warning("%d of %d rows have no answer, the first: %s", len(failed), len(results), failed[0][BAD_ROW])
    print(f"The answers are in {path}")


def exact_match(results: list[Row]) -> float | None:
    """Share of the rows with a reference whose response equals it, outer white space aside; failed rows count."""
    scored = [row["response"].strip() == row["labels"].strip() for row in results if row["labels"] is not None]
    return round(sum(scored) / len(scored), 6) if scored else None
