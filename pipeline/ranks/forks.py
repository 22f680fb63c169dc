"""A forked worker (of a data loader) is another process: our signals are not meant for it, nor its signals for us."""

from __future__ import annotations

import functools
import os
import signal

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class SignalOwner:
    """Who handles the signals of this process: the handlers are its methods.

    Attributes:
        graceful: whether the first signal only asks for a stop, so that workers are needed a little longer.
    """

    graceful = False


@functools.cache
def follow_forks() -> None:
    """From now on a forked child shares neither handlers nor pipe with the owner of this process's signals: a SIGTERM
    meant for it must never ring our bell."""
    os.register_at_fork(before=_hold_signals, after_in_parent=_let_signals, after_in_child=_forget_signals)


def _owner() -> SignalOwner | None:
    owner = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
    return owner if isinstance(owner, SignalOwner) else None


def _hold_signals() -> None:
    if _owner() is not None:
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def _let_signals() -> None:
    if _owner() is not None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _forget_signals() -> None:
    """In a forked child: signals mean what they mean by default, and the parent's pipe is not rung."""
    owner = _owner()
    if owner is None:
        return
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if owner.graceful:
        os.setpgid(0, 0)  # launcher and terminal signal whole groups; a loader's workers are needed up to the last step
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
