"""`make gpu-check`: whether training on this card computes what it should, and how fast, as a table in under 6 minutes.

Held against each other: rows that share a forward pass and the same rows alone, for every form of attention that is
installed; the loss in chunks and the loss of all logits; and steps in which the host must not wait for the card. Then
models of 0.5 and 1.5 billion random weights are trained for some steps: tokens/s, MFU, peak memory. Needs torch,
transformers, peft and accelerate alone (torchao for float8), no Ray, no download.

Exit code: 0; 1 where something is not equal or fails; 2 without a card. ``--device cpu --tiny`` tries the script.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import resource
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

#: As Qwen2.5's: hidden size, that of the MLP, layers, heads, heads of keys, vocabulary.
SHAPES = {"0.5B": (896, 4864, 24, 14, 2, 151936), "1.5B": (1536, 8960, 28, 12, 2, 151936)}
TINY = {"tiny": (64, 96, 2, 4, 2, 512)}
#: Tokens of a forward pass, and what its rows have.
TOKENS, TOKENS_TINY = 8192, 96
#: Largest difference of logits and gradients that rounding explains, of the largest value.
ROUNDING = {"float32": 1e-3, "bfloat16": 5e-2}
SECONDS = 320.0
WAYS = ("rows alone, all logits", "joined, loss in chunks", "the same, compiled", "the same, float8")


@dataclass
class Check:
    """What was found so far."""

    device: str
    dtype: str
    ends: float
    failed: list[str] = field(default_factory=list)

    def line(self, what: str, measure: Callable[[], tuple[bool, str]]) -> None:
        """Print what a measurement says, and note where it says no."""
        import torch

        try:
            is_well, text = measure()
        except torch.OutOfMemoryError:
            print(f"   –  {what:<44} does not fit into this card", flush=True)
            return
        except Exception as error:  # whatever a kernel says on a card that it does not know
            is_well, text = False, f"failed: {type(error).__name__}: {' '.join(str(error).split())[:120]}"
        if not is_well:
            self.failed.append(what)
        print(f"{'  ok ' if is_well else '  NO '} {what:<44} {text}", flush=True)


def model_of(shape: Sequence[int], attention: str, dtype: str, device: str) -> Any:
    """A Qwen2 of this shape with random weights, the same ones whatever the attention is."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from rayswift.modeling import varlen_attention  # noqa: F401  (known to Transformers from here on)

    hidden, inner, layers, heads, key_heads, vocabulary = shape
    config = Qwen2Config(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=key_heads, vocab_size=vocabulary, tie_word_embeddings=True, use_cache=False,
        max_position_embeddings=32768, attn_implementation=attention, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        return Qwen2ForCausalLM(config).to(getattr(torch, dtype)).train()


def rows_of(tokens: int, vocabulary: int) -> list[Any]:
    """Random rows of uneven lengths, so many tokens together."""
    import torch

    random = torch.Generator().manual_seed(2)
    cuts = torch.randperm(tokens - 1, generator=random)[: max(tokens // 350, 3)].add(1).sort().values
    lengths = torch.diff(cuts, prepend=torch.tensor([0]), append=torch.tensor([tokens])).tolist()
    return [torch.randint(3, vocabulary, (length,), generator=random) for length in lengths]


def batch_of(rows: list[Any], device: str) -> tuple[dict[str, Any], Any, Any]:
    """Rows joined to one sequence: what the model takes, labels (of each row the last 60 %), and where those stand."""
    import torch

    from rayswift.train.loss import trained_places

    lengths = [len(row) for row in rows]
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    labels = torch.cat([torch.where(torch.arange(len(row)) < max(0.4 * len(row), 1), -100, row) for row in rows])[None]
    places = trained_places(labels)
    inputs = {"input_ids": torch.cat(rows)[None], "position_ids": torch.cat([torch.arange(n) for n in lengths])[None]}
    moved = {name: value.to(device) for name, value in {**inputs, "cu_seq_lens_q": bounds}.items()}
    moved["cu_seq_lens_q"].row_lengths = lengths
    moved |= {"cu_seq_lens_k": moved["cu_seq_lens_q"], "max_length_q": max(lengths), "max_length_k": max(lengths)}
    return moved, labels.to(device), places.to(device)


def difference(found: list[Any], wanted: list[Any]) -> float:
    """The largest one, of the largest value."""
    largest = max(float(value.abs().max()) for value in wanted)
    return max(float((one - other).abs().max()) for one, other in zip(found, wanted, strict=True)) / largest


# --- equal? -------------------------------------------------------------------------------------------------------


def attentions(device: str) -> list[str]:
    """What keeps joined rows apart here, and what says that it is not there."""
    from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

    from rayswift.modeling.varlen_attention import FUSED, NAME

    if device == "cpu":
        return [NAME]
    installed = {"flash_attention_3": is_flash_attn_3_available, "flash_attention_2": is_flash_attn_2_available}
    for name, is_there in installed.items():
        if not is_there():
            print(f"   –  {name} is not installed")
    return [*(name for name, is_there in installed.items() if is_there()), FUSED, NAME, "flex_attention"]


def joined_is_alone(attention: str, shape: Sequence[int], tokens: int, check: Check) -> tuple[bool, str]:
    """Logits and gradients of joined rows against those of each row alone under PyTorch's own attention."""
    import torch

    rows = rows_of(tokens, shape[-1])
    alone, joined = (model_of(shape, name, check.dtype, check.device) for name in ("sdpa", attention))
    wanted = torch.cat([alone(input_ids=row[None].to(check.device)).logits[0].float() for row in rows])
    found = joined(**batch_of(rows, check.device)[0]).logits[0].float()
    of_logits = difference([found.detach()], [wanted.detach()])
    for logits in (wanted, found):
        logits.square().mean().backward()
    of_gradients = difference(*([one.grad.float() for one in model.parameters()] for model in (joined, alone)))
    is_equal = max(of_logits, of_gradients) <= ROUNDING[check.dtype]
    return is_equal, f"logits differ by {of_logits:.1e}, gradients by {of_gradients:.1e}"


def chunks_are_whole(shape: Sequence[int], tokens: int, check: Check) -> tuple[bool, str]:
    """Loss and gradients in chunks against those of all logits, in float32, and the memory of both."""
    import torch

    from rayswift.train.loss import find_loss_head

    model = model_of(shape, "sdpa", "float32", check.device)
    labels = torch.cat(rows_of(tokens, shape[-1]))[None].to(check.device)

    def measured(loss_of: Callable[[], Any]) -> tuple[float, list[Any], float]:
        model.zero_grad()
        before = peak(check.device, anew=True)
        loss = loss_of()
        loss.backward()
        gradients = [one.grad.clone() for one in model.parameters()]
        return float(loss.detach()), gradients, peak(check.device) - before

    def all_logits() -> Any:
        logits = model(input_ids=labels).logits[0, :-1].float()
        return torch.nn.functional.cross_entropy(logits, labels[0, 1:], reduction="sum")

    def in_chunks() -> Any:
        with head.scoring(labels) as found:  # type: ignore[union-attr]
            model(input_ids=labels)
        return found[0].loss

    whole, of_whole, memory = measured(all_logits)
    head = find_loss_head(model)
    if head is None:
        return False, "this model's loss is not taken in chunks"
    parts, of_parts, less = measured(in_chunks)
    of_loss, of_gradients = abs(parts - whole) / whole, difference(of_parts, of_whole)
    text = f"loss differs by {of_loss:.1e}, gradients by {of_gradients:.1e}"
    if check.device != "cpu":
        text += f"; {less:.2f} instead of {memory:.2f} GiB"
    return of_loss < 1e-5 and of_gradients < 1e-4, text


# --- how fast? ----------------------------------------------------------------------------------------------------


def peak(device: str, anew: bool = False) -> float:
    """The most GiB that were taken, of the card, or without one of this process."""
    import torch

    if device == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if anew:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**30
    return torch.cuda.max_memory_allocated() / 2**30


class Training:
    """Steps of one model in one of the ``WAYS``, with LoRA or of all weights, as RaySwift trains."""

    def __init__(self, shape: Sequence[int], way: int, lora: bool, attention: str, tokens: int, check: Check) -> None:
        import torch

        from rayswift.train.flops import FlopCount
        from rayswift.train.loss import find_loss_head

        self.check, self.rows = check, rows_of(tokens, shape[-1])
        self.model = model_of(shape, attention if way else "sdpa", check.dtype if lora else "float32", check.device)
        if lora:
            self._add_lora()
        self.flops = FlopCount.of(self.model)
        self.head = None
        if way:
            with self.precision():
                self.head = find_loss_head(self.model)
            if self.head is None:
                raise RuntimeError("this model's loss is not taken in chunks")
        if way == 3:
            from rayswift.train.compiled import check_float8, to_float8

            check_float8()
            to_float8(self.model)
        if way >= 2:
            from rayswift.train.compiled import compile_layers
            from rayswift.train.config import PackedPlan

            compile_layers(self.model, "aot_eager" if check.device == "cpu" else None, None, PackedPlan(attention))
        trained = [one for one in self.model.parameters() if one.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)

    def _add_lora(self) -> None:
        from peft import LoraConfig, get_peft_model

        from rayswift.train.fused_lora import fuse_lora

        settings = LoraConfig(r=8, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear")
        self.model = get_peft_model(self.model, settings).train()
        fuse_lora(self.model)

    def precision(self) -> Any:
        """As a Trainer computes."""
        import torch

        return torch.autocast(self.check.device, torch.bfloat16, enabled=self.check.dtype == "bfloat16")

    def prepared(self) -> list[Any]:
        """The micro-batches of a step on the device."""
        groups = [self.rows] if self.head is not None else [[row] for row in self.rows]
        return [batch_of(rows, self.check.device) for rows in groups]

    def backward(self, batches: list[Any]) -> Any:
        """The gradients of a step; its loss."""
        import torch

        from rayswift import private

        losses = []
        for inputs, labels, places in batches:
            with self.precision():
                if self.head is None:
                    logits = self.model(input_ids=inputs["input_ids"]).logits[0, :-1].float()
                    loss = torch.nn.functional.cross_entropy(logits, labels[0, 1:], reduction="sum")
                else:
                    by_mask = self.model.config._attn_implementation == "flex_attention"
                    with self.head.scoring(labels, places=places) as found, private.no_mask_questions(by_mask):
                        self.model(**inputs)
                    loss = found[0].loss
            loss.backward()
            losses.append(loss.detach())
        return torch.stack(losses).sum()

    def step(self) -> float:
        """One step, to its end; the loss."""
        loss = self.backward(self.prepared())
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss)


@contextlib.contextmanager
def counted_waits(device: str) -> Iterator[list[str]]:
    """Where the host waits for the card meanwhile."""
    import torch

    found: list[str] = []
    if device == "cpu":
        yield found
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            yield found
    finally:
        torch.cuda.set_sync_debug_mode("default")
    found += [f"{Path(one.filename).name}:{one.lineno}" for one in said if "synchroniz" in str(one.message)]


def no_waiting(shape: Sequence[int], lora: bool, attention: str, tokens: int, check: Check) -> tuple[bool, str]:
    """Forward and backward pass of a micro-step in which the host never waits."""
    training = Training(shape, 1, lora, attention, tokens, check)
    training.step()
    batches = training.prepared()
    with counted_waits(check.device) as waits:
        training.backward(batches)
    if check.device == "cpu":
        return True, "(there is nothing to wait for on a CPU)"
    return not waits, f"the host waits {len(waits)} times {' '.join(sorted(set(waits)))[:100]}".rstrip()


def speed(shape: Sequence[int], way: int, lora: bool, attention: str, tokens: int, check: Check) -> tuple[bool, str]:
    """A row of the table."""
    import torch

    from rayswift.train.flops import peak_tflops

    peak(check.device, anew=True)
    training = Training(shape, way, lora, attention, tokens, check)
    for _ in range(2):  # compiling among it
        loss = training.step()
    began, steps = time.monotonic(), 0
    while steps < 3 or (time.monotonic() - began < 4 and steps < 20):
        training.step()
        steps += 1
    seconds = (time.monotonic() - began) / steps
    inputs, labels, _ = batch_of(training.rows, "cpu")
    flops = training.flops.of_batch({"cu_seq_lens_q": inputs["cu_seq_lens_q"], "labels": labels})[2]
    name = torch.cuda.get_device_name() if check.device == "cuda" else None
    most = peak_tflops(name)
    mfu = f"{flops / seconds / most / 1e10:.1f} %" if most else "–"
    memory = peak(check.device)
    return True, f"{tokens / seconds:>10,.0f} {flops / seconds / 1e12:>8.2f} {mfu:>8} {memory:>9.2f} {loss:>11.1f}"


def table(shapes: dict[str, Sequence[int]], attention: str, tokens: int, check: Check) -> None:
    """Every model, way and kind of training, as long as there is time."""
    import importlib.util

    print(f"\n  {tokens} tokens a step, attention {attention}\n"
          f"      {'':<44} {'tokens/s':>10} {'TFLOP/s':>8} {'MFU':>8} {'peak GiB':>9} {'loss':>11}")  # fmt: skip
    has_float8 = check.device != "cpu" and importlib.util.find_spec("torchao")
    for name, shape in shapes.items():
        for lora in (True, False):
            for way, text in enumerate(WAYS):
                what = f"{name} {'LoRA' if lora else 'full'}: {text}"
                if way == 3 and (lora or not has_float8):
                    continue
                if time.monotonic() > check.ends:
                    print(f"   –  {what:<44} no time left")
                    continue
                check.line(what, functools.partial(speed, shape, way, lora, attention, tokens, check))


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="shapes that a CPU trains in seconds")
    options = parser.parse_args(argv)
    began = time.monotonic()
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        print("gpu-check: no CUDA device here; --device cpu --tiny tries the script itself", file=sys.stderr)
        return 2
    check = Check(options.device, "float32" if options.device == "cpu" else "bfloat16", began + SECONDS)
    shapes, tokens = (TINY, TOKENS_TINY) if options.tiny else (SHAPES, TOKENS)
    small = TINY["tiny"] if options.tiny else (*SHAPES["0.5B"][:2], 4, *SHAPES["0.5B"][3:])
    name = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, {check.dtype}", flush=True)
    equal = []
    for attention in attentions(options.device):
        before = len(check.failed)
        few = functools.partial(joined_is_alone, attention, small, min(tokens, 1024), check)
        check.line(f"joined rows as alone: {attention}", few)
        equal += [attention] if len(check.failed) == before else []
    check.line("loss in chunks as of all logits", functools.partial(chunks_are_whole, small, tokens // 4, check))
    fastest = next((one for one in equal if one != "flex_attention"), "rayswift_varlen")
    for lora in (True, False):
        what = f"no waiting in a micro-step: {'LoRA' if lora else 'full'}"
        check.line(what, functools.partial(no_waiting, small, lora, fastest, min(tokens, 1024), check))
    table(shapes, fastest, tokens, check)
    print(f"\n{'not well: ' + ', '.join(check.failed) if check.failed else 'all well'}"
          f" ({time.monotonic() - began:.0f} s)")  # fmt: skip
    return 1 if check.failed else 0


if __name__ == "__main__":
    sys.exit(main())
