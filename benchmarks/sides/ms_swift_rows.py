"""Side (runs in ms-swift's environment): what ``swift sft`` does with a dataset before training, without lazy_tokenize.

Its own pipeline class does the work: ``load_dataset`` (read, rows → messages) and then ``_encode_dataset``, which
encodes every row in ``dataset_num_proc`` processes and keeps its length (``AddLengthPreprocessor``; at training time
each row is encoded again). Timed: these two calls. Not timed: imports, arguments, loading the tokenizer. The model is
not loaded.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", required=True)
    parser.add_argument("--max_length", required=True)
    parser.add_argument("--num_proc", required=True)
    parser.add_argument("--tokens", type=Path)
    parser.add_argument("--sample", type=int, default=1000)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()

    from swift.pipelines.train.sft import SwiftSft

    class DataOnly(SwiftSft):
        """The pipeline without the model's weights."""

        def _prepare_model_tokenizer(self, **_: Any) -> None:
            self.model, self.processor = self.args.get_model_processor(load_model=False)

    pipeline = DataOnly(swift_arguments(options))
    started = time.perf_counter()
    train, _ = pipeline._get_dataset()
    train, _ = pipeline._encode_dataset(train, None)
    seconds = time.perf_counter() - started
    lengths = np.array([max(row) if isinstance(row, list) else row for row in train["lengths"]])
    if options.tokens:
        write_tokens(options.tokens, pipeline.template, train, lengths, options.sample)
    packages = ("ms-swift", "transformers", "tokenizers", "datasets", "torch")
    result = {
        "seconds": seconds,
        "rows": len(train),
        "tokens": int(lengths.sum()),
        "versions": {"python": sys.version.split()[0], **{name: metadata.version(name) for name in packages}},
    }
    options.out.write_text(json.dumps(result))


def swift_arguments(options: argparse.Namespace) -> list[str]:
    """The command line after ``swift sft``."""
    plugin = Path(__file__).with_name("ms_swift_template.py")
    return [
        "--model", options.model, "--model_type", "llama",
        "--external_plugins", str(plugin), "--template", "chatml_same_end",
        "--dataset", options.rows, "--dataset_shuffle", "false", "--split_dataset_ratio", "0",
        "--dataset_num_proc", options.num_proc, "--max_length", options.max_length,
        "--load_from_cache_file", "false", "--lazy_tokenize", "false",
        "--use_cpu", "true", "--torch_dtype", "float32",
        "--output_dir", str(options.out.with_name("output")),
    ]  # fmt: skip


def write_tokens(path: Path, template: Any, train: Any, lengths: np.ndarray, sample: int) -> None:
    """All lengths, and ids and labels of evenly spread rows, end to end, encoded as training would."""
    numbers = np.linspace(0, len(train) - 1, min(sample, len(train))).astype(int)
    encoded = [template.encode(train[int(number)], return_length=True) for number in numbers]
    ids, labels = ([np.array(row[name], np.int32) for row in encoded] for name in ("input_ids", "labels"))
    np.savez(path, lengths=lengths, numbers=numbers, ids=np.concatenate(ids), labels=np.concatenate(labels))


if __name__ == "__main__":
    main()
