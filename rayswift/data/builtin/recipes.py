"""Well-known datasets whose rows are in no usual schema: a function for each, from raw row to a row that is.

Ids, columns and wording are those of SWIFT's list of datasets, so that both train on the same texts.
"""

from __future__ import annotations

import json
import re

from rayswift.data.json_text import JsonRow

_TURN = re.compile(r"\n\n(?:Human|Assistant|Hum):")


def dolly(row: JsonRow) -> JsonRow:
    """databricks-dolly-15k: the context stands before the instruction."""
    context = f"Here gives some useful information:\n{row['context']}\n" if row["context"] else ""
    return {"query": context + row["instruction"], "response": row["response"]}


def long_alpaca(row: JsonRow) -> JsonRow:
    """LongAlpaca-12k: answers begin with ``Answer: ``."""
    answer = row["output"]
    stripped = answer.removeprefix("Answer: ").strip() if answer.startswith("Answer: ") else answer
    return {"instruction": row["instruction"], "input": row.get("input"), "output": stripped}


def hh_rlhf(row: JsonRow) -> JsonRow:
    """hh-rlhf: two transcripts of ``Human:`` and ``Assistant:`` turns."""
    return {"messages": _transcript(row["chosen"]), "rejected_messages": _transcript(row["rejected"])}


def _transcript(text: str) -> list[JsonRow]:
    turns = [turn.strip() for turn in _TURN.split(text.strip())]
    turns[0] = turns[0].removeprefix("Human:").strip()
    # The original text begins with the separator itself.
    turns = turns if turns[0] else turns[1:]
    return [{"role": ("user", "assistant")[n % 2], "content": turn} for n, turn in enumerate(turns)]


def orpo_mix(row: JsonRow) -> JsonRow | None:
    """orpo-dpo-mix-40k without its toxic part."""
    if row["source"] == "toxic-dpo-v0.2":
        return None
    return {"messages": row["chosen"], "rejected_messages": row["rejected"]}


def xlam(row: JsonRow) -> JsonRow:
    """xlam-function-calling-60k: answers are a JSON list of calls."""
    calls = [
        {"role": "tool_call", "content": json.dumps(call, ensure_ascii=False)} for call in json.loads(row["answers"])
    ]
    return {"messages": [{"role": "user", "content": row["query"]}, *calls], "tools": row["tools"]}


def stsb(row: JsonRow) -> JsonRow:
    """stsb for vectors: two sentences, and how alike they are from 0 to 1."""
    one, other = ([{"role": "user", "content": row[name]}] for name in ("sentence1", "sentence2"))
    return {"messages": one, "positive_messages": [other], "label": row["score"]}


def stsb_alike(row: JsonRow) -> JsonRow | None:
    """The pairs of stsb that mean the same, for InfoNCE."""
    return stsb(row) if float(row["score"]) >= 0.75 else None


def _stsb_question(row: JsonRow) -> str:
    return (
        "Task: Based on the given two sentences, provide a similarity score between 0.0 and 1.0.\n"
        f"Sentence 1: {row['sentence1']}\nSentence 2: {row['sentence2']}\nSimilarity score: "
    )


def stsb_generate(row: JsonRow) -> JsonRow:
    """stsb as a question with a number for an answer."""
    return {"query": _stsb_question(row), "response": f"{row['score']:.1f}"}


def stsb_regression(row: JsonRow) -> JsonRow:
    """stsb as a question with a number to tell."""
    return {"query": _stsb_question(row), "label": row["score"]}


def sentence_label(row: JsonRow) -> JsonRow:
    """A sentence and its class."""
    return {"query": row["sentence"], "label": int(row["label"])}


def reranking(row: JsonRow) -> JsonRow:
    """MTEB's reranking sets: a query, documents that fit it, and others."""
    sides = {side: row[side] if isinstance(row[side], list) else [row[side]] for side in ("positive", "negative")}
    documents = {f"{side}_messages": [[{"role": "assistant", "content": text}] for text in texts]
                 for side, texts in sides.items()}  # fmt: skip
    return {"messages": [{"role": "user", "content": row["query"]}], **documents}


#: Entries in the keys of ``dataset_info.json``.
ENTRIES: list[JsonRow] = [
    {
        "ms_dataset_id": "AI-ModelScope/databricks-dolly-15k",
        "hf_dataset_id": "databricks/databricks-dolly-15k",
        "preprocess": dolly,
        "tags": ["en", "quality"],
    },
    {
        "ms_dataset_id": "AI-ModelScope/LongAlpaca-12k",
        "hf_dataset_id": "Yukang/LongAlpaca-12k",
        "preprocess": long_alpaca,
        "tags": ["long"],
    },
    {
        "ms_dataset_id": "AI-ModelScope/hh-rlhf",
        "subsets": ["helpful-base", "helpful-online", "helpful-rejection-sampled"],
        "split": ["train", "test"],
        "preprocess": hh_rlhf,
        "tags": ["dpo"],
        "huge_dataset": True,
    },
    {
        "ms_dataset_id": "AI-ModelScope/orpo-dpo-mix-40k",
        "hf_dataset_id": "mlabonne/orpo-dpo-mix-40k",
        "preprocess": orpo_mix,
        "tags": ["dpo", "orpo", "en"],
    },
    {
        "ms_dataset_id": "LLM-Research/xlam-function-calling-60k",
        "hf_dataset_id": "Salesforce/xlam-function-calling-60k",
        "subsets": [{"name": "default", "subset": "dataset"}],
        "preprocess": xlam,
        "tags": ["agent"],
    },
    {
        "ms_dataset_id": "sentence-transformers/stsb",
        "hf_dataset_id": "sentence-transformers/stsb",
        "subsets": [
            {"name": "default", "preprocess": stsb},
            {"name": "positive", "preprocess": stsb_alike},
            {"name": "generate", "preprocess": stsb_generate},
            {"name": "reg", "preprocess": stsb_regression},
        ],
        "tags": ["similarity"],
    },
    {
        "ms_dataset_id": "DAMO_NLP/jd",
        "subsets": [{"name": "cls", "preprocess": sentence_label}],
        "split": ["train", "validation"],
        "tags": ["classification"],
    },
    {
        "ms_dataset_id": "MTEB/scidocs-reranking",
        "hf_dataset_id": "mteb/scidocs-reranking",
        "split": ["validation", "test"],
        "preprocess": reranking,
        "tags": ["rerank"],
    },
    {
        "ms_dataset_id": "MTEB/stackoverflowdupquestions-reranking",
        "hf_dataset_id": "mteb/stackoverflowdupquestions-reranking",
        "split": ["train", "test"],
        "preprocess": reranking,
        "tags": ["rerank"],
    },
]
