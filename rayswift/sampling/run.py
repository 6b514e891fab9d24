"""The flow of ``rayswift sample``."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rayswift.arguments import deciding_settings
from rayswift.console import say
from rayswift.data.plugins import PluginFile
from rayswift.errors import UserError
from rayswift.generate.media import has_media
from rayswift.generate.sources import sources_of
from rayswift.generate.types import Request
from rayswift.inference.run import Throughput, progress_bar
from rayswift.journal import Journal, open_journal, run_identity
from rayswift.modeling.resolved import resolve_model
from rayswift.sampling.choice import SampleStats, SelectionRules, chosen_rows
from rayswift.sampling.engines import Answers, open_answers
from rayswift.sampling.output import Files, write_rows
from rayswift.sampling.prompts import Prompt, read_prompts
from rayswift.sampling.scoring import check_references, make_scorers, score_prompts

if TYPE_CHECKING:
    from rayswift.arguments import SampleArguments

logger = logging.getLogger("rayswift.sampling")

Row = dict[str, Any]


def sample(args: SampleArguments) -> Row:
    """Sample ``--num_return_sequences`` answers to every prompt, score them, and write the best.

    Returns:
        ``output_file`` and the counts that are printed at the end.

    Raises:
        UserError: a dataset, model, endpoint or reward that cannot be used, results that cannot be written.
    """
    model = resolve_model(args) if args.sampler_engine in ("vllm", "transformers") else None
    args = args if model is None else model.args
    for path in args.external_plugins:
        PluginFile.read(path).registered()
    scorers = make_scorers(args)
    prompts = read_prompts(args, model)
    check_references(scorers, prompts)
    identity = run_identity(deciding_settings(args), [{"id": prompt.id, **prompt.row} for prompt in prompts])
    sources = {} if args.sampler_engine == "no" else sources_of(args, model)
    files = Files.of(args, identity, sources)
    if files.result.exists() and not args.override_exist_file:
        logger.info("%s is finished, whatever it was made with: nothing to do; --override_exist_file true writes it "
                    "anew, and another --output_file begins beside it", files.result)  # fmt: skip
        return {"output_file": str(files.result)}
    counts = SampleStats(prompts=len(prompts))
    # What decides the scores: their settings, and the text of the plugins.
    plugins = [text for path in args.external_plugins for text in PluginFile.read(path).texts]
    scored = run_identity({"plugins": plugins, **deciding_settings(args, "scores")}, [{"of": identity}])
    rewards = {name: mark for scorer in scorers.values() for name, mark in scorer.sources().items()}
    with (
        told_how_to_resume(files),
        open_journal(files.answers, identity, override=args.override_exist_file, sources=sources) as journal,
        open_journal(files.scores, scored, override=True, sources=sources | rewards) as scores,
    ):
        tally = answer_prompts(args, prompts, journal)
        candidates = Candidates(prompts, journal, args.num_return_sequences)
        score_prompts(scorers, prompts, candidates, scores)
        write_rows(files.result, chosen_rows(SelectionRules.of(args), prompts, candidates, scores, counts))
    for journal_file in (files.answers, files.scores):  # the result is whole
        journal_file.unlink(missing_ok=True)
    return report(args, files, counts, tally)


@contextlib.contextmanager
def told_how_to_resume(files: Files) -> Iterator[None]:
    """After Ctrl-C, say how the run goes on."""
    try:
        yield
    except KeyboardInterrupt:
        logger.info("the same command with --output_file %s goes on where it stopped", files.result.name)
        raise


class Candidates:
    """The answers to each prompt: those of ``--cache_files``, then those of the journal, without the failed ones."""

    def __init__(self, prompts: Sequence[Prompt], journal: Journal, per_prompt: int) -> None:
        self.prompts, self.journal, self.per_prompt = prompts, journal, per_prompt

    def __getitem__(self, index: int) -> list[str]:
        records = (self.journal.get(number) for number in self.numbers(index))
        return [*self.prompts[index].cached, *(record["text"] for record in records if record and is_answer(record))]

    def numbers(self, index: int) -> range:
        """The numbers of the answers that an engine gives to a prompt."""
        cached = len(self.prompts[index].cached)
        first = index * self.per_prompt
        return range(first + min(cached, self.per_prompt), first + self.per_prompt)


def is_answer(record: Row) -> bool:
    """Whether a record of the journal is an answer: an empty one, in those of earlier versions too, is none."""
    return not record["error"] and bool(record["text"].strip())


def answer_prompts(args: SampleArguments, prompts: Sequence[Prompt], journal: Journal) -> Throughput:
    """Let the engine answer what the journal lacks; each answer is on disk when the next one is looked at."""
    if args.sampler_engine == "no":
        return Throughput()
    requests, total = missing(args, prompts, journal)
    done = total - sum(len(request.numbers) for request in requests)
    if done:
        logger.info("%d of %d answers are there already: they are kept", done, total)
    if not requests:
        return Throughput()
    failed, first_failure = 0, ""
    files = any(has_media(request.row) for request in requests)
    with (
        open_engine(args, files) as answers,
        progress_bar(total, done, hidden=False, name="sample", unit="answer") as bar,
    ):
        tally = Throughput()
        for number, answer in answers(requests):
            if not answer.error and not answer.text.strip():
                answer = replace(answer, error="the answer is empty")
            journal.add(number, {"text": answer.text, "tokens": answer.num_generated_tokens, "error": answer.error})
            tally.add(answer)
            failed += answer.error is not None
            first_failure = first_failure or answer.error or ""
            bar.set_postfix_str(f"{tally.engine_tokens_per_second:.1f} tokens/s", refresh=False)
            bar.update(1)
    if failed:
        logger.warning("%d of %d answers failed, the first: %s", failed, total, first_failure)
    return tally


@contextlib.contextmanager
def open_engine(args: SampleArguments, files: bool) -> Iterator[Answers]:
    """As :func:`open_answers`; errors speak of ``--sampler_engine``."""
    try:
        with open_answers(args, files) as answers:
            yield answers
    except UserError as error:
        raise type(error)(str(error).replace("--infer_backend", "--sampler_engine")) from None


def missing(args: SampleArguments, prompts: Sequence[Prompt], journal: Journal) -> tuple[list[Request], int]:
    """What the engine has to answer, and how many answers it has to give in the whole run."""
    candidates, requests, total = Candidates(prompts, journal, args.num_return_sequences), [], 0
    for index, prompt in enumerate(prompts):
        numbers = candidates.numbers(index)
        total += len(numbers)
        if wanted := tuple(number for number in numbers if number not in journal):
            seeds = tuple(prompt.seed(args.seed, number % args.num_return_sequences) for number in wanted)
            requests.append(Request(wanted, prompt.row, seeds))
    return requests, total


def report(args: SampleArguments, files: Files, counts: SampleStats, tally: Throughput) -> Row:
    """Print what was done and what can be done next.

    The ``tokens/s`` that is returned leaves out the start of the engines; in the printed statistics, which are infer's,
    it counts.
    """
    if args.sampler_engine != "no":
        say(tally.statistics(counts.prompts))
    say(counts.describe())
    say(f"The rows are in {files.result}")
    if counts.rows:
        say(f"Next: rayswift sft --model MODEL --dataset {files.result}")
    tokens = {name: getattr(tally, name) for name in ("num_prompt_tokens", "num_generated_tokens")}
    rate = round(tally.engine_tokens_per_second, 4)
    return {"output_file": str(files.result), **counts.to_dict(), **tokens, "tokens/s": rate}
