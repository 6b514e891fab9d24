"""What `rayswift doctor` finds in the nodes' reports, and what its probe measures here."""

from __future__ import annotations

import socket
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rayswift.arguments import make_arguments
from rayswift.cli import doctor as cli
from rayswift.cluster.doctor import Finding, Level, checks
from rayswift.cluster.doctor.examination import Examination, default_hub, quick_look
from rayswift.cluster.doctor.probe import NodeProbe
from rayswift.errors import UserError

GIB = 2**30
A100 = {"name": "NVIDIA A100-SXM4-80GB", "memory": "81920 MiB", "driver": "570.1"}
WELL: dict[str, Any] = {
    "python": "3.11.7", "packages": {"rayswift": "0.1.0", "ray": "2.60.0", "torch": "2.13.0"}, "gpus": [],
    "open_files": 65536, "shm": (50 * GIB, 100 * GIB), "tmp": (500 * GIB, 1000 * GIB),
}  # fmt: skip


def reports(**second: Any) -> dict[str, Any]:
    return {"10.0.0.1": WELL, "10.0.0.2": {**WELL, **second}}


OTHER_TORCH = {"packages": {**WELL["packages"], "torch": "2.12.0"}}
ONE_GPU, TWO_KINDS = reports(gpus=[A100]), reports(gpus=[A100, {**A100, "name": "T4"}])
NO_RAY = {"packages": {"rayswift": "0.1.0", "torch": "2.13.0"}}


@pytest.mark.parametrize(
    ("findings", "level", "says", "mend"),
    [
        (checks.check_versions(reports()), "ok", "the same on 2 nodes", ""),
        (checks.check_versions(reports(**OTHER_TORCH)), "error", "torch differs: 2.12.0 on 10.0.0.2", "same image"),
        (checks.check_versions(reports(python="3.12.1")), "error", "python differs", "same image"),
        (checks.check_versions(reports(**NO_RAY)), "error", "missing on 10.0.0.2", "same image"),
        (checks.check_clocks({"a": (0.3, 0.1), "b": (-0.5, 0.01)}), "ok", "within 0.49 s", ""),
        (checks.check_clocks({"a": (-5.0, 0.1)}), "warning", "a: its clock is 4.9 s off", "chrony"),
        (checks.check_clocks({"a": (5.0, 4.0)}), "ok", "within 1.00 s", ""),  # it took long to ask
        (checks.check_clocks({"a": (-500.0, 0.1)}), "error", "499.9 s off", "chrony"),
        (checks.check_shared_memory(reports(shm=(1, 64 * 2**20)), {"10.0.0.2": 1e9}), "warning", "0.2", "--shm-size"),
        (checks.check_shared_memory(reports(), {"10.0.0.2": 1e9}), "ok", "100.0 GiB", ""),
        (checks.check_limits(reports(open_files=1024)), "warning", "10.0.0.2", "ulimit -n 65536"),
        (checks.check_disks(reports(tmp=(GIB, GIB)), None, {}, 3 * GIB), "error", "two checkpoints of", "--temp-dir"),
        (checks.check_disks(reports(), "/nfs", {"10.0.0.1": GIB // 2}, 0), "error", "/nfs has 0.5", "--save_total"),
        (checks.check_storage(None, {}, {}), "warning", "not checked", "--storage_path"),
        (checks.check_storage("/nfs", {"b": "Permission denied"}, {"a": []}), "error", "b cannot write below", "mount"),
        (checks.check_storage("/nfs", {}, {"a": ["b"], "b": ["a"]}), "error", "a does not see what b wrote", "s3:"),
        (checks.check_storage("/nfs", {}, {"a": [], "b": []}), "ok", "read on all", ""),
        (checks.check_hub({"a": "timed out"}, "https://h"), "warning", "does not answer a (timed out)", "HF_ENDPOINT"),
        (checks.check_ports({"a": ["b:6379 (refused)"], "b": []}), "error", "a does not reach b", "security group"),
        (checks.check_bandwidth({"a → b": 2e9, "b → a": 0.5e9}, True), "warning", "b → a: 4.00 GBit/s", "zone"),
        (checks.check_bandwidth({"a → b": 2e9, "b → a": 0.5e9}, False), "ok", "at least 4.0 GBit/s", ""),
        (checks.check_bandwidth({"a → b": "timed out"}, False), "error", "a → b: timed out", "all ports"),
        (checks.check_all_reduce("gloo", 2, "timed out"), "error", "gloo over 2 ranks: timed", "GLOO_SOCKET"),
        (checks.check_all_reduce("nccl", 16, "not tested: 8 GPUs are in use"), "warning", "in use", "NCCL"),
        (checks.check_all_reduce("nccl", 16, 80e9), "ok", "80.00 GB/s", ""),
        (checks.check_accelerators(ONE_GPU, {"10.0.0.2": 8}, None), "error", "1 GPUs and Ray counts 8", "nvidia-smi"),
        (checks.check_accelerators(reports(gpus=[A100]), {"10.0.0.2": 1}, None), "ok", "1 × NVIDIA A100", ""),
        (checks.check_accelerators(TWO_KINDS, {"10.0.0.2": 2}, None), "warning", "T4", "one kind"),
        (checks.check_accelerators(reports(), {}, "--num_workers 9 needs 9 CPUs; use 2"), "error", "9 CPUs", "use 2"),
    ],
)  # fmt: skip
def test_a_report_leads_to_a_finding_with_its_mend(findings: Any, level: str, says: str, mend: str) -> None:
    found = max(findings, key=lambda finding: list(Level).index(finding.level))
    assert found.level == level
    assert says in found.message
    assert mend in found.mend
    assert bool(found.mend) == (level != "ok")


def test_only_a_node_that_was_lost_and_is_not_back_is_dead() -> None:
    def node(address: str, alive: bool, reason: int) -> dict[str, Any]:
        return {"NodeManagerAddress": address, "Alive": alive, "DeathReason": reason}

    head_is_back = [node("10.0.0.1", False, 2), node("10.0.0.1", True, 0)]
    scaled_down = [node("10.0.0.2", False, reason) for reason in (1, 3, 4)]
    assert list(checks.check_nodes([*head_is_back, *scaled_down])) == []
    [found] = checks.check_nodes([*head_is_back, *scaled_down, node("10.0.0.3", False, 2)])
    assert (found.level, found.message) == ("warning", "dead: 10.0.0.3")


def test_it_is_well_with_warnings_but_not_with_errors() -> None:
    warning, error = Finding("disk", Level.WARNING, "w", "m"), Finding("disk", Level.ERROR, "e", "m")
    assert Examination([warning], {}).is_well
    assert not Examination([warning, error], {}).is_well
    assert Examination([error], {}).as_json()["findings"][0]["level"] == "error"


def test_a_probe_sees_what_others_wrote_and_leaves_nothing(tmp_path: Path) -> None:
    one, other = NodeProbe(), NodeProbe()
    (tmp_path / "nfs").mkdir()
    folder = f"{tmp_path}/nfs/runs/a/.doctor"
    assert one.write(folder, "one", "x") == ""
    assert other.write(folder, "other", "x") == ""
    assert one.missing(folder, ["one", "other"], "x") == []
    assert other.missing(folder, ["one", "third"], "x") == ["third"]
    assert other.missing(folder, ["one"], "y") == ["one"]
    other.remove(folder)
    one.remove(folder)
    assert list((tmp_path / "nfs").iterdir()) == []
    (tmp_path / "file").write_text("")
    assert "Not a directory" in one.write(f"{tmp_path}/file/runs", "one", "x")
    assert "nowhere" in one.write("nowhere://bucket/runs", "one", "x")


def test_a_probe_measures_this_machine() -> None:
    probe = NodeProbe()
    assert probe.send("127.0.0.1", NodeProbe().listen(), seconds=0.05) > 1e6
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert probe.reaches([("127.0.0.1", port)]) == []
    assert probe.reaches([("127.0.0.1", port)])[0].startswith(f"127.0.0.1:{port} (")
    assert probe.reaches_hub(f"http://127.0.0.1:{port}") != ""
    facts = probe.facts()
    assert facts["packages"]["ray"]
    assert facts["shm"][1] is None or facts["shm"][1] > 0


def test_an_all_reduce_sums_over_its_ranks() -> None:
    probes, speeds = [NodeProbe()], list[float]()
    address = f"127.0.0.1:{probes[0].free_port()}"
    thread = threading.Thread(target=lambda: speeds.append(probes[0].all_reduce(0, 1, address, "gloo")))
    thread.start()
    thread.join(60)
    assert speeds == [0.0]  # nothing goes over the wire of one rank


def test_a_command_says_where_its_results_go_and_how_large_its_checkpoints_are(tmp_path: Path) -> None:
    options = cli.doctor_parser().parse_args(
        ["--quick", "sft", "--model", "m", "--dataset", "d", "--output_dir", "/nfs/o"]
    )
    args = cli._command_arguments(options.words)
    assert (options.quick, args.command, cli._storage(options, args)) == (True, "sft", "/nfs/o")
    options = cli.doctor_parser().parse_args(["--storage_path", "s3://b/runs"])
    assert cli._storage(options, None) == "s3://b/runs"
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(bytes(2000))
    sizes = [
        cli._checkpoint_bytes(make_arguments("sft", model=str(tmp_path), dataset=["d"], train_type=kind, **more))
        for kind, more in (("lora", {}), ("full", {}), ("full", {"save_only_model": True}))
    ]
    assert sizes == [100, 2000 + 1000 * 12, 2000]
    with pytest.raises(UserError, match="status needs no look"):
        cli._command_arguments(["status"])


def test_a_node_that_answers_no_more_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    from rayswift.cluster.doctor import examination

    def find(*_: Any) -> Any:
        yield Finding("clocks", Level.OK, "within 0.1 s")
        raise ray.exceptions.GetTimeoutError("no answer in 60 s")

    node = {"Alive": True, "NodeManagerAddress": "10.0.0.1", "NodeManagerPort": 1, "Resources": {}}
    monkeypatch.setattr(ray, "nodes", lambda: [node, {**node, "Alive": False, "NodeManagerAddress": "10.0.0.9"}])
    monkeypatch.setattr(ray, "kill", lambda _: None)
    monkeypatch.setattr(examination, "_start", lambda *_: ({"10.0.0.1": "probe"}, {"10.0.0.1": WELL}))
    monkeypatch.setattr(examination, "_find", find)
    found = examination.examine(quick=True)
    assert [(one.check, one.level) for one in found.findings] == [
        ("nodes", "warning"), ("clocks", "ok"), ("nodes", "error"),
    ]  # fmt: skip
    assert "10.0.0.9" in found.findings[0].message
    assert "no answer in 60 s" in found.findings[-1].message


def test_the_hub_is_the_one_that_the_environment_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror")
    monkeypatch.delenv("MODELSCOPE_DOMAIN", raising=False)
    assert (default_hub(True), default_hub(False)) == ("https://mirror", "https://www.modelscope.cn")


def test_before_a_job_on_several_nodes_what_is_wrong_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = [
        Finding("clocks", Level.OK, "within 0.1 s"),
        Finding("storage", Level.ERROR, "/o is not shared", "s3"),
    ]
    monkeypatch.setattr("rayswift.cluster.doctor.examination.examine", lambda **_: Examination(found, {}))
    for embedded, nodes in ((True, 1), (False, 1), (False, 2)):
        quick_look(SimpleNamespace(embedded=embedded, nodes=nodes), "/o")  # type: ignore[arg-type]
    assert capsys.readouterr().out == "error: storage: /o is not shared (mend: s3)\n"
