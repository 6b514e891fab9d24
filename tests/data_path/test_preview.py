"""``rayswift data preview`` as its user meets it: what is printed, the page, and mistakes."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import subprocess
import sys
import zlib
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from rayswift.cli.main import main

DATA = Path(__file__).resolve().parents[1] / "data"
GSM8K = DATA / "gsm8k_40.jsonl"
PROBE = """
import sys
from rayswift.cli.main import main
status = main(sys.argv[1:])
heavy = [name for name in ("torch", "ray", "transformers", "numpy", "pyarrow") if name in sys.modules]
print("HEAVY", heavy, file=sys.stderr)
sys.exit(status)
"""
Look = Callable[..., str]


@pytest.fixture
def look(capsys: pytest.CaptureFixture[str]) -> Look:
    """Runs a preview that must succeed and returns what it printed."""

    def run(*words: Any) -> str:
        assert main(["data", "preview", *map(str, words)]) == 0
        return capsys.readouterr().out

    return run


def refusal(capsys: pytest.CaptureFixture[str], *words: Any) -> str:
    """What a preview says that must be refused."""
    assert main(["data", "preview", *map(str, words)]) == 2
    return capsys.readouterr().err


def write_rows(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


class Page(HTMLParser):
    """A page taken apart: its elements, the text in each kind of token span, and all text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.trained: list[str] = []
        self.tokens: list[str] = []
        self.text = ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "pre" and ("class", "tokens") in attrs:
            self.trained.append("")
            self.tokens.append("")
        if tag not in ("meta", "img", "rect", "line"):
            self.open.append(f"{tag} {dict(attrs).get('class', '')}".strip())

    def handle_endtag(self, tag: str) -> None:
        if tag in ("rect", "line"):
            return
        assert self.open.pop().split()[0] == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.open and self.open[-1] in ("span t", "span c"):
            self.tokens[-1] += data
            self.trained[-1] += data if self.open[-1] == "span t" else ""

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


# --- the terminal -----------------------------------------------------------------------------------------------


def test_each_stage_of_a_row_with_its_trained_tokens_marked(look: Look, smollm2_dir: str) -> None:
    first = json.loads(GSM8K.read_text("utf-8").splitlines()[0])
    shown = look("--dataset", GSM8K, "--model", smollm2_dir, "--num_shown", 1)
    assert f"row 1 of 1 shown, {GSM8K}:1" in shown
    assert f'"question": {json.dumps(first["question"])}' in shown
    standard = shown[shown.index("standard row") : shown.index("encoded sample")]
    assert standard.split() == f"standard row user {first['question']} assistant {first['answer']}".split()
    marked = re.findall("▮(.*?)▮", shown, flags=re.DOTALL)
    assert [text.replace("\n  ", "\n") for text in marked] == [first["answer"] + "<|im_end|>"]


def test_lengths_are_those_of_the_tokenizer(look: Look, smollm2_dir: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    rows = [json.loads(line) for line in GSM8K.read_text("utf-8").splitlines()]
    chats = [[{"role": "user", "content": r["question"]}, {"role": "assistant", "content": r["answer"]}] for r in rows]
    texts = [tokenizer.apply_chat_template(chat, tokenize=False).removesuffix("\n") for chat in chats]
    lengths = [len(tokenizer(text)["input_ids"]) for text in texts]
    limit = sorted(lengths)[20]
    shown = look("--dataset", GSM8K, "--model", smollm2_dir, "--num_shown", 0, "--max_length", limit)
    long = [length for length in lengths if length > limit]
    assert f"min {min(lengths)}, mean {sum(lengths) / 40:.1f}, " in shown
    assert f"max {max(lengths)}; {len(long)} longer than --max_length {limit}" in shown
    bars = [tuple(map(int, bar)) for bar in re.findall(r"^ +(\d+) – +(\d+)  █* +(\d+)", shown, flags=re.MULTILINE)]
    assert bars == [(low, high, sum(low <= length <= high for length in lengths)) for low, high, _ in bars]
    assert sum(number for _, _, number in bars) == 40
    first_long = next(number for number, length in enumerate(lengths, start=1) if length > limit)
    assert f"dropped {len(long)}: longer than --max_length {limit} (first at {GSM8K}:{first_long})" in shown
    assert f"40 rows in, 40 standard rows, {40 - len(long)} samples out" in shown
    assert f"({sum(lengths) - sum(long):,} ids, " in shown


def test_without_a_model_it_ends_at_standard_rows(look: Look) -> None:
    shown = look("--dataset", DATA / "glaive_toolcall_3.json")
    assert "encoded sample" not in shown
    assert "--model NAME adds" in shown
    assert "tool_call" in shown
    assert "3 rows in, 3 standard rows; 0 dropped" in shown


def test_the_drop_report_names_reason_count_and_first_place(look: Look, tmp_path: Path) -> None:
    bad: list[Any] = [{"foo": 1}, "text"]
    path = write_rows(tmp_path / "rows.jsonl", bad[0], {"query": "q", "response": "a"}, bad[1], bad[0])
    shown = look("--dataset", path)
    assert re.search(rf"dropped 2: .*foo.* \(first at {re.escape(str(path))}:1\)", shown)
    assert re.search(rf"dropped 1: .* \(first at {re.escape(str(path))}:3\)", shown)
    assert "4 rows in, 1 standard rows; 3 dropped" in shown
    assert f"row 1 of 1 shown, {path}:2" in shown


def test_only_the_first_rows_are_read(look: Look, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", *({"query": f"q{n}", "response": "a"} for n in range(9)))
    with path.open("a") as file:
        file.write("{broken\n")
    shown = look("--dataset", path, "--preview_rows", 9, "--num_shown", 2)
    assert "the first 9 rows read" in shown
    assert [f"q{n}" in shown for n in range(3)] == [True, True, False]


def test_every_dataset_is_shown(look: Look, tmp_path: Path) -> None:
    one = write_rows(tmp_path / "one.jsonl", {"query": "q", "response": "first"})
    two = write_rows(tmp_path / "two.jsonl", {"query": "q", "response": "second"})
    shown = look("--dataset", one, "--val_dataset", two, "--preview_rows", "all")
    assert shown.index(f"Dataset {one}") < shown.index("first") < shown.index(f"Dataset {two}")
    assert shown.count("all 1 row read") == 2


def test_a_split_row_is_shown_in_its_parts(look: Look, smollm2_dir: str, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", {"query": "q", "response": "one two three " * 30})
    limits = ("--max_length", 60, "--truncation_strategy", "split")
    shown = look("--dataset", path, "--model", smollm2_dir, *limits)
    count = int(re.findall(r"encoded sample 1 of (\d): 60 ids", shown)[0])
    assert count > 1
    assert f"1 rows in, 1 standard rows, {count} samples out" in shown


def test_both_sides_of_a_pair_and_the_label_of_a_kto_row(look: Look, smollm2_dir: str, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "first"}] * 2
    pair = {"messages": [*turns[:3], {"role": "assistant", "content": "good"}], "rejected_response": "bad"}
    path = write_rows(tmp_path / "x.jsonl", pair, {"messages": turns[:2], "label": False})
    output = tmp_path / "page.html"
    shown = look("--dataset", path, "--model", smollm2_dir, "--output", output)
    chosen, rejected = (shown.split(f"encoded sample ({side})")[1].split("encoded sample")[0]
                        for side in ("chosen", "rejected"))  # fmt: skip
    assert re.findall("▮(.*?)▮", chosen) == ["good<|im_end|>"]
    assert re.findall("▮(.*?)▮", rejected.split("──")[0]) == ["bad<|im_end|>"]
    assert 'rejected_response: "bad"' in shown
    assert "label: false" in shown
    assert "2 samples out" in shown
    page = Page(output)
    assert page.trained == ["good<|im_end|>", "bad<|im_end|>", "first<|im_end|>"]
    everything = shown.split("row 2 of 2 shown")[0]
    asked = look("--dataset", path, "--model", smollm2_dir, "--loss_scale", "default").split("row 2 of 2 shown")[0]
    assert (everything.count("first<|im_end|>▮"), asked.count("first<|im_end|>▮")) == (0, 2)


def test_control_characters_do_not_reach_the_terminal(look: Look, smollm2_dir: str, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", {"query": "\x1b[2J", "response": "\x1b]0;title\x07"})
    shown = look("--dataset", path, "--model", smollm2_dir)
    assert not re.search("[\x00-\x08\x0b-\x1f]", shown)
    assert "▮\\u001b]0;title\\u0007<|im_end|>▮" in shown


def test_colours_on_a_terminal_only(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    words = ["data", "preview", "--dataset", str(GSM8K), "--num_shown", "1"]
    assert main(words) == 0
    assert "\x1b[32massistant\x1b[0m" in capsys.readouterr().out
    monkeypatch.setenv("NO_COLOR", "1")
    assert main(words) == 0
    assert "\x1b" not in capsys.readouterr().out


# --- the page ---------------------------------------------------------------------------------------------------


def png(path: Path, red: int = 255) -> bytes:
    """Writes a picture of one pixel."""

    def block(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = (1).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    pixel = zlib.compress(bytes([0, red, 0, 0]))
    data = b"\x89PNG\r\n\x1a\n" + block(b"IHDR", header) + block(b"IDAT", pixel) + block(b"IEND", b"")
    path.write_bytes(data)
    return data


def test_the_page_shows_hostile_text_as_text(look: Look, smollm2_dir: str, tmp_path: Path) -> None:
    attack = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'></pre></span>"
    answer = f"{attack} 你好 🦙 a  b\n\nc"
    row = {"query": attack, "response": answer, "channel": attack, "margin": attack}
    path, output = write_rows(tmp_path / "<b>rows.jsonl", row), tmp_path / "page.html"
    look("--dataset", path, "--model", smollm2_dir, "--output", output)
    page = Page(output)
    assert page.open == []
    assert not page.all("script")
    assert not page.all("img")
    assert not page.all("b")
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert page.trained == [answer + "<|im_end|>"]
    assert attack in page.tokens[0].split("<|im_start|>assistant")[0]


def test_the_pages_policy_allows_its_own_style_and_inline_pictures_only(look: Look, tmp_path: Path) -> None:
    output = tmp_path / "page.html"
    look("--dataset", GSM8K, "--output", output)
    page = Page(output)
    policy = next(meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    style = re.findall("<style>(.*?)</style>", page.source, flags=re.DOTALL)[0]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert policy is not None
    assert f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'" in policy
    assert not [name for _, attributes in page.elements for name in attributes if name in ("style", "href")]
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.all("meta")
    assert "prefers-color-scheme: dark" in style
    assert "--model NAME adds" in page.text


def test_the_page_says_of_each_token_its_id_and_weight(look: Look, smollm2_dir: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    output = tmp_path / "page.html"
    shown = look("--dataset", GSM8K, "--model", smollm2_dir, "--num_shown", 2, "--output", output)
    page = Page(output)
    spans = [span for span in page.all("span") if span.get("class") in ("t", "c")]
    found = [re.fullmatch(r"id ([\d ]+), weight (\d+)", span["title"] or "") for span in spans]
    ids = [int(word) for match in found if match for word in match.group(1).split()]
    decode = AutoTokenizer.from_pretrained(smollm2_dir).decode
    assert decode(ids) == "".join(page.tokens)
    assert {(span["class"], match.group(2)) for span, match in zip(spans, found, strict=True) if match} == {
        ("t", "1"), ("c", "0")
    }  # fmt: skip
    assert len(ids) == sum(map(int, re.findall(r"encoded sample: (\d+) ids", shown)))
    bars = [re.findall(r"(\d+) rows", title) for title in re.findall("<title>(.*?ids.*?)</title>", page.source)]
    assert sum(int(number) for bar in bars for number in bar) == 40
    assert len(page.all("svg")) == 1


def test_the_page_has_the_drop_report(look: Look, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", {"query": "q", "response": "a"}, {"<i>": 1})
    output = tmp_path / "page.html"
    look("--dataset", path, "--output", output)
    page = Page(output)
    assert f"{path}:2" in page.text
    assert "2 rows in, 1 standard rows; 1 dropped" in page.text
    assert len(page.all("td")) == 3
    assert not page.all("i")


def test_pictures_of_local_files_are_in_the_page_and_others_are_named(
    look: Look, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rayswift.data.preview import page as preview_page

    monkeypatch.setenv("ROOT_IMAGE_DIR", str(tmp_path))
    pixel = png(tmp_path / "pixel.png")
    (tmp_path / "secret.png").write_text("password")
    (tmp_path / "big.png").write_bytes(pixel + bytes(preview_page.MAX_PICTURE_BYTES))
    inline = f"data:image/png;base64,{base64.b64encode(png(tmp_path / 'other.png', 9)).decode()}"
    names = ["pixel.png", "secret.png", "big.png", "gone.png", "https://example.com/x.png"]
    vector = 'data:image/svg+xml,<svg onload="alert(1)"/>'
    row = {"query": "<image>" * 7, "response": "a", "images": [*names, inline, vector]}
    output = tmp_path / "page.html"
    look("--dataset", write_rows(tmp_path / "rows.jsonl", row), "--output", output)
    page = Page(output)
    shown = [picture["src"] for picture in page.all("img")]
    assert shown == [f"data:image/png;base64,{base64.b64encode(pixel).decode()}", inline]
    assert "secret.png (not a picture that browsers show)" in page.text
    assert "password" not in page.source
    assert "big.png (2.0 MB, too big to show)" in page.text
    assert "gone.png (no such file)" in page.text
    assert "https://example.com/x.png (not fetched)" in page.text


# --- mistakes and help ------------------------------------------------------------------------------------------


def test_mistakes_name_the_place_and_the_mend(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"query": "q", "response": "a"}\n{"query": \n')
    assert f"{broken}:2: broken JSON" in refusal(capsys, "--dataset", broken)
    useless = write_rows(tmp_path / "useless.jsonl", {"foo": 1})
    assert f"{useless}: no usable row: 1 rows dropped" in refusal(capsys, "--dataset", useless)
    (tmp_path / "empty.jsonl").touch()
    assert "no usable row: it is empty" in refusal(capsys, "--dataset", tmp_path / "empty.jsonl")
    assert "nowhere.jsonl" in refusal(capsys, "--dataset", tmp_path / "nowhere.jsonl")
    mixed = write_rows(tmp_path / "mixed.jsonl", {"query": "q", "response": "a"}, {"foo": 1})
    assert f"{mixed}:2: " in refusal(capsys, "--dataset", mixed, "--strict", "true")
    page = tmp_path / "no" / "page.html"
    assert f"--output {page}: no folder" in refusal(capsys, "--dataset", mixed, "--output", page)


def test_no_row_fits(capsys: pytest.CaptureFixture[str], smollm2_dir: str) -> None:
    said = refusal(capsys, "--dataset", GSM8K, "--model", smollm2_dir, "--max_length", 10)
    assert f"no usable row: 40 rows dropped: longer than --max_length 10 (first at {GSM8K}:1)" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--dataset is required"),
        (["--dataset", "d", "--preview_rows", "0"], "--preview_rows 0: expected a whole number of at least 1, or all"),
        (["--dataset", "d", "--output", "page.pdf"], "--output page.pdf: the page is HTML"),
        (["--dataset", "d", "--adapters", "a"], "--adapters: a preview needs the tokenizer only"),
        (["--dataset", "d", "--lora_rank", "16"], "--lora_rank is no flag of rayswift data preview"),
    ],
)
def test_wrong_flags(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in refusal(capsys, *words)


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["data"], 0, "preview"),
        (["data", "--help"], 0, "preview"),
        (["data", "preview", "--help"], 0, "--preview_rows"),
        (["data", "preview"], 2, "--dataset is required"),
        (["data", "prview"], 2, "unknown word prview; did you mean preview?"),
        (["--help"], 0, "\n  data "),
    ],
)
def test_help_and_mistakes_load_nothing_heavy(words: list[str], status: int, said: str) -> None:
    done = subprocess.run([sys.executable, "-c", PROBE, *words], capture_output=True, text=True, timeout=60)
    assert done.stderr.endswith("HEAVY []\n"), done.stderr
    assert done.returncode == status
    assert said in (done.stderr if status else done.stdout)
