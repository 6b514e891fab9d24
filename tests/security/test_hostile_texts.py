"""Patterns, globs, YAML and texts that strangers wrote: nothing takes for ever, ends in a traceback or is a command."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from rayswift.arguments import parse_arguments
from rayswift.errors import UserError
from rayswift.exporting import ollama
from rayswift.hub.datasets import choose_data_files
from rayswift.modeling.adapter_folder import lora_rank, read_adapter_config
from rayswift.rewards import maths, outcome


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """The block takes no longer (processor time, so that a busy machine does not matter)."""
    start = time.process_time()
    yield
    assert time.process_time() - start < seconds


# --- adapters -----------------------------------------------------------------------------------------------------

ENDLESS = ["(a+)+$", "(.*)*x", "(a|a)*$", "(?:a|aa)+b", ".*.*.*.*.*.*x", "(a?){30}a", "((a*)*)*",
           "(a|b|ab)(a|b|ab)" * 12,
           "a?" * 30 + "a" * 30, "(?x)(a+) +b", "(a+)(?#and)*b", "(?i:(a+)+)b", "(x+x+)+y", r"(\w+\.)*z"]  # fmt: skip
MEANT = [
    "q_proj", "model.layers.0.self_attn.q_proj", "^model.layers.1.mlp", r".*\.layers\.29\.mlp\.down_proj",
    r".*(q_proj|k_proj|v_proj)", r"model\.layers\.(?:[0-9]|1[0-5])\.self_attn\.(q|k|v|o)_proj",
    r"^(model\.language_model(?=\.).*\.(gate_proj|down_proj|q_proj|o_proj|up_proj|v_proj|k_proj)"
    r"|model\.visual(?=\.).*\.(qkv|proj|fc1|fc2))$",
]  # fmt: skip


def adapter(folder: Path, **config: Any) -> str:
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8, **config}))
    return str(folder)


@pytest.mark.parametrize("pattern", ENDLESS)
@pytest.mark.parametrize(
    "name", ["rank_pattern", "alpha_pattern", "target_modules", "modules_to_save", "layers_pattern"]
)
def test_an_adapter_with_an_endless_pattern_is_refused(name: str, pattern: str, tmp_path: Path) -> None:
    given: Any = {pattern: 4} if name.endswith("k_pattern") or name == "alpha_pattern" else pattern
    given = [pattern] if name == "modules_to_save" else given
    with (
        within(0.1),
        pytest.raises(UserError, match=f"adapter_config.json: {name} has patterns that may take for ever"),
    ):
        read_adapter_config(adapter(tmp_path, **{name: given}))


def test_patterns_that_peft_and_swift_write_are_taken(tmp_path: Path) -> None:
    for pattern in MEANT:
        folder = adapter(tmp_path, rank_pattern={pattern: 16}, target_modules=pattern, exclude_modules=pattern)
        assert lora_rank(folder) == 16
    names = [f"model.layers.{layer}.mlp.{part}_proj" for layer in range(100) for part in ("up", "gate", "down")]
    assert lora_rank(adapter(tmp_path, rank_pattern=dict.fromkeys(names, 2), target_modules=names * 30)) == 8
    with pytest.raises(UserError, match="for ever"):  # many together take as long as one
        read_adapter_config(adapter(tmp_path, rank_pattern={f".*{name}.*": 2 for name in names}))


# --- datasets -----------------------------------------------------------------------------------------------------


def choose(paths: list[str], data_files: str) -> list[str]:
    readme = f"---\nconfigs:\n- {{config_name: default, data_files: {data_files}}}\n---\n"
    return choose_data_files("org/name", [*paths, "README.md"], lambda name: readme)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.csv", ["a.csv"]), ("**/*.csv", ["a.csv", "x/b.csv", "x/y/c.csv"]), ("x/**", ["x/b.csv", "x/y/c.csv"]),
        ("x/*", ["x/b.csv"]), ("x", ["x/b.csv", "x/y/c.csv"]), ("*/y", ["x/y/c.csv"]), ("**/y/*", ["x/y/c.csv"]),
        ("x/**/c.csv", ["x/y/c.csv"]), ("**/[bc].csv", ["x/b.csv", "x/y/c.csv"]), ("x/y/c.csv", ["x/y/c.csv"]),
        ("**/**/?.csv", ["a.csv", "x/b.csv", "x/y/c.csv"]), ("**", ["a.csv", "x/b.csv", "x/y/c.csv"]),
        ("**/[!b].csv", ["a.csv", "x/y/c.csv"]),
    ],
)  # fmt: skip
def test_globs_mean_files(pattern: str, expected: list[str]) -> None:
    assert choose(["a.csv", "x/b.csv", "x/y/c.csv"], json.dumps(pattern)) == expected


@pytest.mark.parametrize("pattern", ["*a" * 60 + "b", "**/*a" * 40 + "/b", "**/" * 60 + "b", "*" * 500 + "b", "[z-a]*",
                                     "[a", "*[", "?" * 200, "**a" * 40])  # fmt: skip
def test_a_hostile_glob_costs_no_time(pattern: str) -> None:
    paths = [f"{'a' * 200}{number}.csv" for number in range(50)] + ["a/" * 60 + "a.csv"] * 50
    with within(1), pytest.raises(UserError, match="not in the repository"):
        choose(paths, json.dumps(pattern))


DEEP = "[" * 600 + "]" * 600
BOMB = "\n".join(["a0: &a0 [x, x]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12))])
BROKEN_YAML = [
    DEEP,
    "x: !!timestamp 3",
    "x: !!int ''",
    "x: !!bool 7",
    "x: 2001-99-99",
    "x: !!python/object:os.system a",
]


@pytest.mark.parametrize("text", BROKEN_YAML)
def test_a_readme_with_broken_yaml_is_passed_over(text: str, caplog: pytest.LogCaptureFixture) -> None:
    assert choose_data_files("o/n", ["a.csv", "README.md"], lambda name: f"---\n{text}\n---\n") == ["a.csv"]
    assert "is broken; going by file names" in caplog.text


def test_yaml_that_grows_without_end_is_no_name() -> None:
    for use in ("data_files: *a11", "data_files: [{split: *a11, path: a.csv}]", "config_name: *a11, data_files: a.csv",
                "data_dir: *a11"):  # fmt: skip
        readme = f"---\n{BOMB}\nconfigs:\n- {{{use}}}\n---\n"
        with within(1):
            try:
                said = str(choose_data_files("o/n", ["a.csv", "README.md"], {"README.md": readme}.__getitem__))
            except UserError as error:
                said = str(error)
        assert len(said) < 500


@pytest.mark.parametrize("text", BROKEN_YAML)
def test_a_broken_configuration_file_is_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "sft.yaml").write_text(text)
    with pytest.raises(UserError, match=r"sft\.yaml.*: (not valid YAML|expected settings)") as refused:
        parse_arguments("sft", [str(tmp_path / "sft.yaml")])
    assert "\n" not in str(refused.value)


# --- answers ------------------------------------------------------------------------------------------------------

N = 40_000
ANSWERS = [
    "answer" + " " * N, " " * N, " " * N + "answer", "final" + " " * N, "answer " * (N // 7), "answer is" + "\n" * N,
    "# answer" + "\n" * N, "#" * N, "#\n" * (N // 2), "####\t" * (N // 5), "1" + ",111" * (N // 4) + "1",
    "1." * (N // 2),
    "\\boxed{" * (N // 7), "<answer>" * (N // 8), "$1" * (N // 2), "\\(" * (N // 2), "\n" * N, "答案：" + "：" * N,
    "<think>" + "</think><answer>" * (N // 16), "<think>" + "</think> \n" * (N // 10),
    "<think>" + "</think>Action:" * (N // 15),
    "Action: a" + " " * N + "b", "Action Input: a" + " " * N + "b", "Action Input:" + " \n" * (N // 2) + "x",
    "<think></think><answer></answer>" + " " * N + "x",
]  # fmt: skip


@pytest.mark.parametrize("text", ANSWERS, ids=range(len(ANSWERS)))
def test_an_answer_of_any_form_is_scored_at_once(text: str) -> None:
    with within(0.5):
        maths.final_answer(text)
        maths.final_number(text)
        outcome.format_reward([text])
        outcome.react_format([text])
        outcome.read_action(text)


def test_answers_mean_what_they_meant() -> None:
    assert maths.marked_answer("So the final  answer is: 7.") == "7"
    assert maths.marked_answer("## Answer\n\n12 cats\n") == "12 cats"
    assert outcome.format_reward([" <think>a</think>\n<answer>b</answer> ", "<think>a</think>b<answer>c</answer>",
                                  "<think></think><answer></answer>", "<think></answer>",
                                  "<think>a</think><answer>b"]) == [1, 0, 1, 0, 0]  # fmt: skip
    assert outcome.react_format(["<think>a</think> Action: b Action Input: c", "<think>a</think>Action Input: c",
                                 "Action: b Action Input: c"]) == [1, 0, 0]  # fmt: skip
    assert outcome.read_action('Action:  find it \t\nAction Input:  {"q": 1} \nObservation: x') == ("find it", {"q": 1})
    assert outcome.read_action("Action: a\nAction Input: raw <|end|>") == ("a", "raw")


# --- a Modelfile --------------------------------------------------------------------------------------------------


class Encoder:
    """What `modelfile` takes of the real one."""

    def __init__(self, folder: Path, system: str | None) -> None:
        self.model_dir, self.system, self.stop_words = str(folder), system, ["stop\nSYSTEM evil"]
        self.tokenizer = type("Tokenizer", (), {"eos_token": "</s>"})


@pytest.mark.parametrize("where", ["system", "template"])
def test_no_text_ends_itself_in_a_modelfile(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evil = 'Be kind."""\nADAPTER /etc/evil\nSYSTEM """'
    monkeypatch.setattr(
        ollama, "ollama_template", lambda encoder: (None, evil if where == "template" else "{{ .System }}")
    )
    with pytest.raises(UserError, match='holds """') as refused:
        ollama.modelfile(Encoder(tmp_path, evil if where == "system" else None), ".", None)  # type: ignore[arg-type]
    assert where in str(refused.value)


def test_a_models_settings_are_no_commands_of_a_modelfile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ollama, "ollama_template", lambda encoder: (None, "{{ .System }}"))
    settings = {"temperature": '0.5\nSYSTEM """evil"""', "top_k": [1], "top_p": 0.9, "max_new_tokens": True}
    for content in (json.dumps(settings), "[1]", "7", "[" * 100_000):
        (tmp_path / "generation_config.json").write_text(content)
        text = ollama.modelfile(Encoder(tmp_path, "Be\nkind."), ".", None)  # type: ignore[arg-type]
        assert [line.split()[0] for line in text.splitlines()] == [
            "FROM", "TEMPLATE", "SYSTEM", 'kind."""', "PARAMETER", "PARAMETER", *["PARAMETER"] * ("top_p" in content)
        ]  # fmt: skip
