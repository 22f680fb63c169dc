"""Runtime and failures: one failure, one line, everybody gone within seconds.

Three ranks under the command ``torchrun``, under an agent of torchrun, and from the fork server without a launcher
(rank 0 hosts the store).
"""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers_spawn import RankResult, run_ranks
from helpers_torchrun import run_agents

from pipeline.base.errors import ConfigError, line_of
from pipeline.edges.connect import EdgeSpecs, connect
from pipeline.edges.wire import FieldSpec, Header, MessageKind, MessageSpec
from pipeline.ranks import runtime as runtime_module
from pipeline.ranks.failure import FailureReporter
from pipeline.ranks.forks import SIGNALS
from pipeline.ranks.runtime import Runtime, choose_device, set_threads
from pipeline.ranks.start_up import StartUp

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]
WORLD = 3
DEADLINE_S = 20.0
"""What ends earlier has not waited for the deadline."""
HANG_S = 60.0
DEADLINES_S = {"stop": 2.0, "stop two": 2.0, "stop the host": 2.0, "hang": 2.0, "slow": 3.0}
VICTIMS = {"stop two": (1, 2), "stop the host": (0,)}


def specs(rank: int) -> EdgeSpecs:
    down = MessageSpec((FieldSpec("activation", torch.float32, (4,)),), 2)
    up = MessageSpec((FieldSpec("gradient", torch.float32, (4,)),), 2)
    first, last = rank == 0, rank == WORLD - 1
    return EdgeSpecs(
        None if first else down, None if last else down, None if last else up, None if first else up
    )


def job(mode: str, run_dir: str) -> None:
    """Ten steps of a chain; at step 5 something happens to a rank, or to several."""
    with Runtime("cpu", threads=1, deadline_s=DEADLINES_S.get(mode, DEADLINE_S), run_dir=Path(run_dir)) as runtime:
        rank, failures = runtime.team.rank, runtime.failures
        failures.stop_gracefully()
        print(f"pid {os.getpid()} rank {rank}", flush=True)
        failures.describe(f"modules {rank}-{rank} (block{rank})")
        options = {"activation_slots": 2, "gradient_slots": 2, "depth": 2}
        edges = connect(runtime.team, specs(rank), device=runtime.device, backend=runtime.backend, **options)
        for step in range(10):
            failures.progress(0, step, "computing")
            if step == 5:
                happen(mode, runtime)
            if edges.activation_in is not None:
                edges.activation_in.take(MessageKind.TRAIN, 0, step, 0).release()
                edges.gradient_out.send(Header(MessageKind.GRADIENT, 0, step, 0, rows=2), gradient=torch.ones(2, 4))
            if edges.activation_out is not None:
                edges.activation_out.send(
                    Header(MessageKind.TRAIN, 0, step, 0, rows=2), activation=torch.ones(2, 4)
                )
                edges.gradient_in.take(MessageKind.GRADIENT, 0, step, 0).release()
        edges.close()


def happen(mode: str, runtime: Runtime) -> None:
    if mode == "config":
        raise ConfigError("train.batch_size = 0: must be at least 1")
    if mode == "collective":  # the main threads of ranks 0 and 1 sit in C++
        if runtime.team.rank != 2:
            runtime.failures.progress(0, 5, "in a C++ wait")
            runtime.team.store.wait(["never"])
        time.sleep(0.5)
    if runtime.team.rank not in VICTIMS.get(mode, (2,)):
        return
    if mode in DEADLINES_S:
        time.sleep(DEADLINES_S[mode] / 2)  # the others have heard who this is
    print(f"trouble {time.time()}", flush=True)
    if mode == "raise":
        try:
            raise ValueError("boom\nsecond line")
        except ValueError as exc:
            runtime.failures.report(exc, "module 2 (layer3.0-layer3.4)")
    if mode.startswith("stop"):
        os.kill(os.getpid(), signal.SIGSTOP)
    if mode == "hang":
        time.sleep(3600)
    if mode == "slow":  # in all for twice the deadline
        for part in range(12):
            runtime.failures.progress(0, 5, f"part {part}")
            time.sleep(DEADLINES_S["slow"] / 6)
        return
    if mode == "leave":
        os._exit(0)
    os.kill(os.getpid(), signal.SIGKILL)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# -- under a launcher ------------------------------------------------------------------------------------------


@dataclass
class Ended:
    """How a launcher ended. ``lines``: ours; ``seconds`` from the trouble to the end."""

    code: int
    lines: list[str]
    seconds: float


def ended(code: int, output: str) -> Ended:
    """Of a launcher that has just ended; none of its processes may have survived it."""
    now = time.time()
    pids = [int(pid) for pid in re.findall(r"pid (\d+) rank", output)]
    assert len(pids) == WORLD, output
    assert not [pid for pid in pids if alive(pid)]
    trouble = re.search(r"trouble ([\d.]+)", output)
    return Ended(code, [line for line in output.splitlines() if "localpipe:" in line], now - float(trouble[1]))


def torchrun(mode: str, run_dir: Path) -> Ended:
    """A job under the command torchrun."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--monitor-interval=0.1", "--standalone",
        f"--nproc_per_node={WORLD}", __file__, mode, str(run_dir),
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/tests", "OMP_NUM_THREADS": "1"}
    agent = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    )
    try:
        output, _ = agent.communicate(timeout=90)
    finally:
        agent.kill()
    return ended(agent.returncode, output)


def test_torchrun_a_rank_raises(tmp_path: Path) -> None:
    end = torchrun("raise", tmp_path)
    path = tmp_path / "failure-rank2.txt"
    expected = "localpipe: rank 2, module 2 (layer3.0-layer3.4), epoch 0 step 5: ValueError: boom second line"
    assert end.lines == [f"{expected} (traceback: {path})"]
    assert 'raise ValueError("boom' in path.read_text()
    assert end.code != 0 and end.seconds < DEADLINE_S


@pytest.mark.parametrize("mode", ["kill", "collective"])
def test_an_agents_rank_is_killed(tmp_path: Path, mode: str) -> None:
    """Although the survivors get SIGTERM at once, and are to stop in order on SIGTERM."""
    (agent,) = run_agents(job_of_rank, [WORLD], mode, str(tmp_path))
    end = ended(agent.exit_code, agent.stderr)
    assert len(end.lines) == 1
    assert end.lines[0].startswith(
        "localpipe: rank 2 (modules 2-2 (block2)) died without a message (killed? out of memory?); rank "
    )
    assert end.code != 0 and end.seconds < DEADLINE_S
    assert "in a C++ wait (epoch 0 step 5)" in end.lines[0] or mode == "kill"


# -- without a launcher --------------------------------------------------------------------------------------


def job_of_rank(rank: int, mode: str, run_dir: str) -> None:
    job(mode, run_dir)


def our_lines(ranks: list[RankResult]) -> list[str]:
    return [line for r in ranks for line in r.stderr.splitlines() if "localpipe:" in line]


@pytest.mark.parametrize("mode", ["leave", "config", "stop", "stop two", "stop the host", "hang"])
def test_one_line_and_no_survivor(tmp_path: Path, mode: str) -> None:
    ranks = run_ranks(job_of_rank, WORLD, mode, str(tmp_path), timeout_s=HANG_S)
    lines = our_lines(ranks)
    assert len(lines) == 1
    assert all(r.exit_code != 0 for r in ranks if (mode, r.rank) != ("leave", 2))
    if mode == "config":
        assert lines == ["localpipe: train.batch_size = 0: must be at least 1"]
    if mode == "leave":
        assert "rank 2 (modules 2-2 (block2)) died without a message" in lines[0]
    if mode.startswith("stop"):  # who is stopped cannot end itself: the rank that reports it kills it
        victims = VICTIMS.get(mode, (2,))
        assert [r.rank for r in ranks if r.exit_code == -signal.SIGKILL] == list(victims)
        for rank in victims:
            assert f"rank {rank}" in lines[0]
    if mode == "stop":
        assert "rank 2 (modules 2-2 (block2)) has not been heard of for" in lines[0]
        assert "rank 1 waits for the gradient of epoch 0 step 5 micro-batch 0 from rank 2 since" in lines[0]
    if mode == "stop two":
        assert re.search(r"rank 1 \(.*\) has not been heard of for .*, rank 2 \(.*\) has not been heard", lines[0])
    if mode == "stop the host":  # of the store, too: nobody can ask for beats any more
        assert "the store has not answered" in lines[0]
    if mode == "hang":
        assert "has waited" in lines[0] and "(deadline 2 s)" in lines[0]
        assert "rank 2 (modules 2-2 (block2)) has been at 'computing' of epoch 0 step 5 for" in lines[0]
        assert lines[0].count("raise runtime.deadline_s") == 1


def test_a_slow_rank_is_no_error(tmp_path: Path) -> None:
    """Its neighbours wait for twice the deadline, but no part of its work takes so long."""
    ranks = run_ranks(job_of_rank, WORLD, "slow", str(tmp_path), timeout_s=60)
    assert [(r.exit_code, our_lines([r])) for r in ranks] == [(0, [])] * WORLD


def signalled(rank: int, number: int, target: int) -> None:
    with Runtime("cpu", threads=1, deadline_s=20.0) as runtime:
        runtime.failures.progress(1, 2, "waiting")
        runtime.team.broadcast(None)
        if rank == target:
            time.sleep(0.2)
            os.kill(os.getpid(), number)
        runtime.team.store.wait(["never"])


@pytest.mark.parametrize(
    ("number", "target", "line", "code"),
    [
        (signal.SIGTERM, 1, "localpipe: rank 1: stopped by SIGTERM at epoch 1 step 2", 143),
        (signal.SIGINT, 0, "localpipe: stopped by ctrl-C at epoch 1 step 2", 130),
    ],
)
def test_signals_while_the_main_thread_is_in_c(number: int, target: int, line: str, code: int) -> None:
    ranks = run_ranks(signalled, 2, number, target, timeout_s=20)
    assert our_lines(ranks) == [line]
    assert ranks[target].exit_code == code and ranks[1 - target].exit_code == 1


def asked_to_stop(rank: int, mode: str) -> Any:
    """Rank 2 is asked to stop, and asked again; rank 0 learns of it, and all leave in order, or not."""
    with Runtime("cpu", threads=1, deadline_s=DEADLINE_S) as runtime:
        failures = runtime.failures
        failures.stop_gracefully()
        worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(30,))
        worker.start()
        while os.getpgid(worker.pid) != worker.pid:
            time.sleep(0.01)  # it has only just been forked
        runtime.team.broadcast(None)
        assert failures.stop_request() is None
        if rank == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
            if mode == "twice":
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)
        if rank == 0:
            while failures.stop_request() is None:
                time.sleep(0.01)
        reason = runtime.team.broadcast(failures.stop_request())
        worker.terminate()
        worker.join(HANG_S)
        if mode == "death":
            if rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGTERM)  # as the launcher does when a rank dies
            runtime.team.store.wait(["never"])
    return reason, worker.exitcode, signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_signal_asks_all_ranks_to_stop() -> None:
    """A worker of the rank gets a group of its own: the launcher's signal to the rank's group does not end it."""
    ranks = run_ranks(asked_to_stop, WORLD, "once", timeout_s=HANG_S)
    assert [r.value for r in ranks] == [("SIGTERM on rank 2", -signal.SIGTERM, True)] * WORLD
    assert not our_lines(ranks)


def test_a_second_ctrl_c_does_not_wait() -> None:
    ranks = run_ranks(asked_to_stop, WORLD, "twice", timeout_s=HANG_S)
    assert [r.exit_code for r in ranks] == [1, 1, 130]
    assert our_lines(ranks) == ["localpipe: stopped by ctrl-C before the first step"]


def test_a_death_is_reported_although_all_have_been_asked_to_stop() -> None:
    ranks = run_ranks(asked_to_stop, WORLD, "death", timeout_s=HANG_S)
    assert [r.exit_code for r in ranks] == [1, -signal.SIGKILL, 1]
    lines = our_lines(ranks)
    assert len(lines) == 1 and "rank 1 (starting) died without a message" in lines[0]


def host_dies(rank: int) -> None:
    with Runtime("cpu", threads=1, deadline_s=20.0) as runtime:
        runtime.team.broadcast(None)
        time.sleep(1.0)  # the sentinels have read who is who
        if rank == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        runtime.team.store.wait(["never"])


def test_the_host_of_the_store_is_killed() -> None:
    ranks = run_ranks(host_dies, 3, timeout_s=20)
    lines = our_lines(ranks)
    assert len(lines) == 1 and "rank 0 (starting) died without a message" in lines[0]
    assert [r.exit_code for r in ranks] == [-signal.SIGKILL, 1, 1]


def host_stops(rank: int) -> None:
    with Runtime("cpu", threads=1, deadline_s=2.0) as runtime:
        runtime.team.broadcast(None)
        time.sleep(1.0)
        if rank == 0:
            os.kill(os.getpid(), signal.SIGSTOP)
        runtime.team.broadcast("data")  # main threads and sentinels ask a store that does not answer


def test_the_host_of_the_store_stops_in_the_set_up() -> None:
    ranks = run_ranks(host_stops, 3, timeout_s=HANG_S)
    lines = our_lines(ranks)
    assert len(lines) == 1 and "rank 0 (starting) does not answer" in lines[0]
    assert "the store has not answered for" in lines[0]
    assert [r.exit_code for r in ranks] == [-signal.SIGKILL, 1, 1]


def stuck(rank: int) -> None:
    """Nobody waits for it."""
    with Runtime("cpu", threads=1, deadline_s=1.0) as runtime:
        runtime.team.broadcast(None)
        runtime.failures.progress(0, 5, "computing")
        while rank == 1 or not runtime.team.store.check(["never"]):
            time.sleep(3600 if rank == 1 else 0.1)
            runtime.failures.progress(0, 5, "computing")


def test_a_rank_that_is_stuck_reports_itself() -> None:
    ranks = run_ranks(stuck, 2, timeout_s=HANG_S)
    lines = our_lines(ranks)
    assert [r.exit_code for r in ranks] == [1, 1] and len(lines) == 1
    assert re.match(r"localpipe: rank 1 \(starting\) has been at 'computing' of epoch 0 step 5 for \d", lines[0])


def orderly(rank: int) -> Any:
    with Runtime("cpu", threads=1, deadline_s=2.0) as runtime:
        values = runtime.team.gather({"rank": rank})
        first = runtime.team.broadcast(f"from {rank}")
        runtime.team.broadcast(None)
        late = None
        if rank == 0:
            try:
                runtime.team.gather(0)
            except Exception as exc:
                late = f"{type(exc).__name__}: {exc}"
            runtime.team.store.set("late", "1")
        else:
            while not runtime.team.store.check(["late"]):  # hung, for all that the other knows
                time.sleep(0.05)
        # A forked worker (data loader) can be terminated, and its SIGTERM is not taken for ours.
        worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(30,))
        worker.start()
        worker.terminate()
        worker.join(5)
        if rank == 1:
            time.sleep(0.5)  # the others wait in close
    handler = signal.getsignal(signal.SIGTERM)
    return values, first, late, threading.active_count(), handler == signal.SIG_DFL, worker.exitcode


def test_objects_and_orderly_end() -> None:
    ranks = run_ranks(orderly, 2)
    assert [(r.exit_code, our_lines([r])) for r in ranks] == [(0, [])] * 2
    assert ranks[0].value[0] == [{"rank": 0}, {"rank": 1}] and ranks[1].value[0] is None
    assert [r.value[1] for r in ranks] == ["from 0"] * 2
    assert re.match(
        r"DeadlineExceeded: rank 0 has waited \d(\.5)? s for rank 1 to come to a gather; rank 1 \(starting\) has been "
        r"at 'starting' for \d\.\d s - raise runtime.setup_deadline_s",
        ranks[0].value[2],
    )
    assert [r.value[3:] for r in ranks] == [(1, True, -signal.SIGTERM)] * 2


def without_the_other(rank: int, output: str, noted: bool) -> None:
    """Rank 0 of two, both of which have got SIGTERM: the other one before it could note it."""
    os.environ["WORLD_SIZE"] = "2"
    os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT), 1)
    start_up = StartUp()
    start_up.begin()
    if noted:
        os.kill(os.getpid(), signal.SIGTERM)
    with Runtime("cpu", threads=1, deadline_s=0.5, graceful=True):
        pass


@pytest.mark.parametrize("noted", [True, False])
def test_where_a_signal_has_come_a_missing_rank_is_a_stop(tmp_path: Path, noted: bool) -> None:
    (rank,) = run_ranks(without_the_other, 1, str(tmp_path / "output"), noted)
    stopped = "localpipe: stopped by SIGTERM on rank 0 before step 0; nothing was trained\n" if noted else ""
    assert ((tmp_path / "output").read_text(), rank.exit_code) == (stopped, 0 if noted else 1)
    assert len(our_lines([rank])) == (0 if noted else 1)


def no_gpus(rank: int) -> None:
    with Runtime("cuda", threads=1, deadline_s=5.0):
        pass


@pytest.mark.skipif(torch.cuda.device_count() >= 2, reason="this machine has the GPUs asked for")
def test_too_few_gpus_is_line_of() -> None:
    ranks = run_ranks(no_gpus, 2)
    lines = our_lines(ranks)
    assert len(lines) == 1
    assert lines[0].startswith("localpipe: runtime.device = 'cuda' needs NCCL and 2 GPUs on this machine")
    assert [r.exit_code for r in ranks] == [1, 1]


# -- one process ---------------------------------------------------------------------------------------------


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def test_one_process_needs_no_group(alone: None) -> None:
    with Runtime("cpu", threads=1) as runtime:
        assert (runtime.team.rank, runtime.team.size, runtime.team.group) == (0, 1, None)
        assert runtime.team.gather(3) == [3] and runtime.team.broadcast(4) == 4
        runtime.team.broadcast(None)
        assert not dist.is_initialized()


def test_one_process_raises_what_happened_with_the_line_as_a_note(alone: None, tmp_path: Path) -> None:
    error = KeyError("labels")
    with pytest.raises(KeyError) as caught, Runtime("cpu", threads=1, run_dir=tmp_path):
        raise error
    assert caught.value is error
    path = tmp_path / "failure-rank0.txt"
    assert line_of(error) == f"localpipe: rank 0, before the first step: KeyError: 'labels' (traceback: {path})"
    assert "raise error" in path.read_text()


def test_ctrl_c_is_raised_and_says_where(alone: None) -> None:
    with pytest.raises(KeyboardInterrupt) as caught, Runtime("cpu", threads=1) as runtime:
        runtime.failures.progress(3, 4, "computing")
        raise KeyboardInterrupt
    assert line_of(caught.value) == "localpipe: stopped by ctrl-C at epoch 3 step 4"


def test_one_process_stops_when_asked(alone: None) -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with Runtime("cpu", threads=1) as runtime:
        runtime.failures.stop_gracefully()
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert runtime.failures.stop_request() == "SIGTERM on rank 0"
    assert [signal.getsignal(number) for number in SIGNALS] == before
    with pytest.raises(KeyboardInterrupt) as caught, Runtime("cpu", threads=1) as runtime:
        runtime.failures.stop_gracefully()
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
    assert line_of(caught.value) == "localpipe: stopped by ctrl-C before the first step"
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_one_process_outside_of_the_main_thread_leaves_signals_alone(alone: None) -> None:
    def run() -> None:
        with Runtime("cpu", threads=1) as runtime:
            runtime.failures.stop_gracefully()
            found.append(signal.getsignal(signal.SIGTERM))

    found: list[Any] = []
    thread = threading.Thread(target=run)
    thread.start()
    thread.join(HANG_S)
    assert found == [signal.getsignal(signal.SIGTERM)]


def test_one_process_raises_a_refusal_as_it_is(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    failures = FailureReporter(run_dir=tmp_path)
    refusal = ConfigError("data.root = '/nowhere': no such folder")
    with pytest.raises(ConfigError) as caught:
        failures.report(refusal)
    assert caught.value is refusal and line_of(refusal) == "localpipe: data.root = '/nowhere': no such folder"
    assert capfd.readouterr().err == ""
    assert not list(tmp_path.iterdir())


def test_choose_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime_module.dist, "is_nccl_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("auto", 1, 2) == (torch.device("cuda", 1), "nccl")
    assert choose_device("auto", 1, 3) == (torch.device("cpu"), "gloo")
    assert choose_device("cpu", 1, 2) == (torch.device("cpu"), "gloo")
    assert choose_device("cuda-shared", 3, 4) == (torch.device("cuda", 1), "gloo")
    with pytest.raises(ConfigError, match="needs NCCL and 3 GPUs on this machine, one per rank; found 2"):
        choose_device("cuda", 0, 3)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert choose_device("auto", 0, 1) == (torch.device("cpu"), "gloo")
    with pytest.raises(ConfigError, match="found none"):
        choose_device("cuda-shared", 0, 1)
    with pytest.raises(ConfigError, match="unknown device 'tpu'"):
        choose_device("tpu", 0, 1)


def test_threads_are_shared_by_the_ranks_of_a_machine() -> None:
    before = torch.get_num_threads()
    try:
        assert set_threads(0, 1000) == 1 == torch.get_num_threads()
        assert set_threads(3, 1) == 3 == torch.get_num_threads()
        assert set_threads(0, 1) == len(os.sched_getaffinity(0))
    finally:
        torch.set_num_threads(before)


if __name__ == "__main__":
    job(sys.argv[1], sys.argv[2])
