"""``--report_to``: every tracker that is named gets every number; one that is not installed is refused."""

from __future__ import annotations

import importlib.machinery
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from rayswift.arguments import make_arguments
from rayswift.errors import UserError
from rayswift.train.reporters import open_reporters, reporter_names
from rayswift.train.run_directory import RunDirectory


def arguments(*report_to: str, **flags: Any) -> Any:
    return make_arguments("sft", model="m", dataset=["d"], report_to=list(report_to), **flags)


@pytest.fixture
def trackers(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """Stand-ins for both packages, and what they are told."""
    told: dict[str, list[Any]] = {}
    for name in ("wandb", "swanlab"):
        calls = told[name] = []
        module = ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.init = lambda calls=calls, **settings: calls.append(settings)  # type: ignore[attr-defined]
        module.log = lambda values, step, calls=calls: calls.append((values, step))  # type: ignore[attr-defined]
        module.finish = lambda calls=calls: calls.append("finished")  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, module)
    return told


def test_every_tracker_gets_every_number(tmp_path: Path, trackers: dict[str, list[Any]]) -> None:
    run = RunDirectory.create(str(tmp_path), True)
    args = arguments("wandb", "swanlab", "tensorboard", run_name="night", project="p", hub_token="secret")
    reporters = open_reporters(args, run)
    for reporter in reporters:
        reporter.log({"train/loss": 1.5}, 3)
        reporter.close()
    for name, title in (("wandb", "name"), ("swanlab", "experiment_name")):
        settings, *rest = trackers[name]
        assert (settings["project"], settings[title], settings["config"]["model"]) == ("p", "night", "m")
        assert "secret" not in str(settings)
        assert rest == [({"train/loss": 1.5}, 3), "finished"]
    assert list((run.local / "runs").iterdir())
    run.close()


def test_what_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("wandb", "swanlab"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match="--report_to wandb: not installed; pip install wandb"):
        reporter_names(arguments("tensorboard", "wandb"))
    assert reporter_names(arguments("all")) == ["tensorboard"]
    assert reporter_names(arguments("none")) == []


def test_a_tracker_that_refuses_is_one_line(
    tmp_path: Path, trackers: dict[str, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: Any) -> None:
        raise RuntimeError("no API key\nsecond line")

    monkeypatch.setattr(sys.modules["wandb"], "init", refuse)
    run = RunDirectory.create(str(tmp_path), True)
    with pytest.raises(UserError, match=r"^--report_to wandb: .*no API key"):
        open_reporters(arguments("wandb"), run)
    run.close()
