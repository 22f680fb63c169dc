"""What a signal means: nothing to do with us, the end, a request to stop, or the end after all."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from pipeline.ranks.forks import SIGNALS
from pipeline.ranks.signals import END, Signals
from pipeline.ranks.start_up import StartUp

WAIT_S = 5.0


@pytest.fixture
def signals() -> Iterator[Signals]:
    """Of one of several ranks; a thread would wait for them."""
    before = [signal.getsignal(number) for number in (*SIGNALS, signal.SIGCHLD)]
    found = Signals(2, alone=False)
    found.handle_by_pipe()
    yield found
    found.restore()
    assert [signal.getsignal(number) for number in (*SIGNALS, signal.SIGCHLD)] == before
    assert signal.set_wakeup_fd(-1) == -1


def send(number: int) -> None:
    os.kill(os.getpid(), number)


def test_a_signal_means_the_end_until_stops_are_in_order(signals: Signals) -> None:
    assert signals.wait(0.0) is None
    for number in SIGNALS:
        send(number)
        assert signals.wait(WAIT_S) == number and signals.stop is None
        signals._interrupts = 0


def test_the_first_signal_that_asks_for_a_stop_is_the_reason(signals: Signals) -> None:
    signals.stop_gracefully()
    for number in (signal.SIGTERM, signal.SIGINT):
        send(number)
        assert signals.wait(WAIT_S) is None
    assert signals.stop == "SIGTERM on rank 2"


@pytest.mark.parametrize("second", SIGNALS)
def test_after_ctrl_c_the_next_one_is_the_end(signals: Signals, second: int) -> None:
    """Torchrun passes on a second ctrl-C as SIGTERM."""
    signals.stop_gracefully()
    send(signal.SIGINT)
    assert signals.wait(WAIT_S) is None and signals.stop == "SIGINT on rank 2"
    send(second)
    assert signals.wait(WAIT_S) == second


def test_sigterm_may_come_as_often_as_it_likes(signals: Signals) -> None:
    signals.stop_gracefully()
    for _ in range(3):
        send(signal.SIGTERM)
        assert signals.wait(WAIT_S) is None


def test_signals_that_others_handle_ring_and_mean_nothing(signals: Signals) -> None:
    heard: list[int] = []
    before = [signal.signal(number, lambda n, _: heard.append(n)) for number in (signal.SIGUSR1, signal.SIGCHLD)]
    try:
        send(signal.SIGUSR1)
        send(signal.SIGCHLD)
        assert signals.wait(WAIT_S) is None
        assert heard == [signal.SIGUSR1, signal.SIGCHLD] and signals.stop is None
    finally:
        for number, handler in zip((signal.SIGUSR1, signal.SIGCHLD), before, strict=True):
            signal.signal(number, handler)


def test_the_wait_ends_when_it_is_told_to_but_a_signal_comes_first(signals: Signals) -> None:
    found: list[int | None] = []
    thread = threading.Thread(target=lambda: found.append(signals.wait(60.0)))
    thread.start()
    signals.end_wait()
    thread.join(WAIT_S)
    assert found == [END]


def test_a_signal_is_not_lost_to_an_end_at_the_same_time(signals: Signals) -> None:
    send(signal.SIGTERM)
    signals.end_wait()
    assert signals.wait(WAIT_S) == signal.SIGTERM
    os.close(signals._bell)


def test_what_start_up_has_noted_is_a_request_to_stop_once_stops_are_in_order() -> None:
    start_up = StartUp()
    start_up.begin()
    signals = Signals(1, alone=False)
    try:
        send(signal.SIGTERM)
        signals.handle_by_pipe()
        assert signals.stop is None and start_up.noted == []
        signals.stop_gracefully()
        assert signals.stop == "SIGTERM on rank 1"
    finally:
        signals.restore()
        start_up.end()


def test_in_start_up_the_signal_after_ctrl_c_ends_the_process() -> None:
    start_up = StartUp()
    start_up.begin()
    try:
        send(signal.SIGTERM)
        send(signal.SIGTERM)
        send(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGTERM)
    finally:
        start_up.end()


def test_a_worker_that_ends_while_a_failure_is_told_raises_nothing(signals: Signals) -> None:
    def raises(number: int, frame: object) -> None:
        raise RuntimeError("DataLoader worker exited")

    before = signal.signal(signal.SIGCHLD, raises)
    signals.ignore_workers()
    send(signal.SIGCHLD)
    signals.restore()
    assert signal.signal(signal.SIGCHLD, before) is raises
    signals.handle_by_pipe()
