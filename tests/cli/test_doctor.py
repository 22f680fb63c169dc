"""``localpipe doctor``: what it prints, and its exit code."""

from __future__ import annotations

import json
import os
import resource
import socket
import sys
from pathlib import Path

import pytest
import torch
from helpers_spawn import free_port
from helpers_torchrun import run_agents

from pipeline import diagnose, load_config
from pipeline.cli import torchrun
from pipeline.cli.main import main
from pipeline.doctor import diagnose as diagnose_module
from pipeline.doctor.finding import Level


def localpipe(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """Exit code of ``localpipe WORDS``, in this process."""
    monkeypatch.setattr(sys, "argv", ["localpipe", *words])
    return main()


def test_a_node_that_is_fit_ends_with_0(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    assert localpipe(monkeypatch, "doctor", "--set", "runtime.device=cpu", "--json", "found.json") == 0
    *lines, verdict = capsys.readouterr().out.splitlines()
    assert len(lines) == 10 and {line.split()[0] for line in lines} <= set(Level)
    assert verdict.startswith("fit to train (")
    document = json.loads(Path("found.json").read_text())
    assert document["verdict"] == verdict and len(document["findings"]) == 10
    assert not Path("runs").exists()  # it looks, and leaves nothing


def test_a_node_that_is_not_fit_ends_with_1_and_the_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        monkeypatch.setenv("MASTER_PORT", str(other.getsockname()[1]))
        assert localpipe(monkeypatch, "doctor", "--set", "runtime.device=cpu") == 1
    *lines, verdict = capsys.readouterr().out.splitlines()
    assert len(lines) == 11 and verdict.startswith("not fit to train (") and "MASTER_PORT" in verdict


def test_one_process_looks_at_the_node_as_a_rank_per_gpu_would_use_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    seen: list[int] = []
    monkeypatch.setattr(diagnose_module, "examine", lambda job: seen.append(job.here) or iter(()))
    for words in ([], ["model.modules=2", "hierarchy.cascade_span=2"], ["runtime.device=cpu"]):
        diagnose(load_config(assignments=words))
    assert seen == [3, 2, 1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seconds", "0"], "localpipe: --seconds 0: more than 0, at most 600\n"),
        (["--json", "nowhere/found.json"], "localpipe: --json 'nowhere/found.json': there is no directory 'nowhere'\n"),
        (["--recipe", "digit"], "localpipe: --recipe digit: no such recipe"),
        (["--nproc", "0"], "localpipe: --nproc 0: a number of processes (1, 2, ...) or auto\n"),
    ],
)
def test_what_cannot_work_is_refused_on_one_line(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert localpipe(monkeypatch, "doctor", *words) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith(message) and captured.err.count("\n") == 1


def test_nproc_starts_the_same_command_under_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    def become(program: str, command: list[str]) -> None:
        raise SystemExit(" ".join(command))

    monkeypatch.setattr(torchrun.os, "execv", become)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    with pytest.raises(SystemExit, match="--nproc_per_node=3 -m pipeline doctor --seconds 2 --recipe R$"):
        torchrun.become_torchrun("3", 4, ["doctor", "--nproc", "3", "--seconds", "2", "--recipe", "R"])
    with pytest.raises(SystemExit, match="--nproc_per_node=3 -m pipeline doctor --seconds 2$"):
        localpipe(monkeypatch, "doctor", "--nproc", "3", "--seconds", "2")


def on_a_node(rank: int, folder: str, files: int = 0) -> None:
    """The command in a worker of torchrun, which may have so many files open."""
    os.chdir(folder)
    if files:
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # both nodes are this machine
    sys.argv = ["localpipe", "doctor", "--seconds", "0.6", "--set", "runtime.device=cpu", "--json", "found.json"]
    code = main()
    Path(f"code{rank}").write_text(str(code))
    if files:  # an agent that has seen a failure reads no return values, and a fork would wait for that
        sys.stdout.flush()
        os._exit(code)


@pytest.mark.skipif(sys.platform != "linux", reason="lo is what Linux calls it")
def test_two_nodes_have_their_lines_and_the_ranks_theirs(tmp_path: Path) -> None:
    agents = run_agents(on_a_node, [1, 1], str(tmp_path))
    assert [agent.exit_code for agent in agents] == [0, 0], [agent.stderr for agent in agents]
    assert [(tmp_path / f"code{rank}").read_text() for rank in range(2)] == ["0", "0"]
    findings = json.loads((tmp_path / "found.json").read_text())["findings"]
    assert [finding["node"][:6] for finding in findings] == ["node 0"] * 10 + ["node 1"] * 10 + [""] * 3
    assert [finding["subject"] for finding in findings[20:]] == ["versions", "clocks", "neighbours"]
    printed = "".join(agent.stderr for agent in agents)
    assert printed.count("fit to train (") == 1 and "(on two machines)" not in printed


@pytest.mark.skipif(sys.platform != "linux", reason="lo is what Linux calls it")
def test_ranks_that_are_not_fit_end_with_1_and_torchrun_with_the_reason(tmp_path: Path) -> None:
    (agent,) = run_agents(on_a_node, [2], str(tmp_path), 120)
    assert agent.exit_code == 1
    assert [(tmp_path / f"code{rank}").read_text() for rank in range(2)] == ["1", "0"]  # one report of torchrun's
    document = json.loads((tmp_path / "found.json").read_text())
    assert not document["fit"] and "open files 120" in document["verdict"] and len(document["pairs"]) == 1
    assert agent.stderr.count(document["verdict"]) == 2  # printed, and at the end of torchrun's report
