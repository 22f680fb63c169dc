"""Process 1 of the image.

    IMAGE [--recipe NAME ...]     localpipe train --nproc auto ...: torchrun, one process per GPU
    IMAGE plan|evaluate|... ...   localpipe plan|evaluate|export|compare|doctor ...
    IMAGE WORD ...                anything else is the program WORD, in place of this one

Process 1 has two duties that no program below it knows of. The kernel gives it the orphans of all others: it waits for
them, or they stay as zombies. And a signal without a handler does not reach it: it passes signals on, once each, to a
child in a session of its own, which else would get the ctrl-C of a terminal twice. torchrun passes a SIGTERM to all of
its ranks: they stop after the same step and save.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
COMMANDS = ("train", "plan", "evaluate", "export", "compare", "doctor")
LOCALPIPE = [sys.executable, "-m", "pipeline"]


def command_of(words: list[str]) -> tuple[list[str], bool]:
    """The program that ``words`` mean, and whether it is one of localpipe."""
    if not words or words[0].startswith("-"):
        words = ["train", *words]
    if words[0] not in COMMANDS:
        return words, False
    name, *rest = words
    if name == "train" and not any(word.partition("=")[0] == "--nproc" for word in rest):
        rest = ["--nproc", "auto", *rest]
    return [*LOCALPIPE, name, *rest], True


def watch_over(command: list[str]) -> int:
    """Run ``command`` as a child until it ends; returns its exit code, 128 + n if signal n has ended it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # what comes before there is a child waits for it
    child = os.fork()
    if child == 0:
        try:
            os.setsid()
            for number in SIGNALS:  # one that was ignored before, as ctrl-C is in the background, would stay so
                signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            os.execvp(command[0], command)
        except OSError as error:
            os.write(2, f"localpipe: {command[0]}: {error.strerror}\n".encode())
        finally:
            os._exit(127)

    def pass_on(number: int, frame: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, number)

    for number in SIGNALS:
        signal.signal(number, pass_on)
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    while True:
        ended, status = os.wait()  # again after a signal
        if ended == child:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code


def main() -> int:
    command, ours = command_of(sys.argv[1:])
    if ours:
        return watch_over(command)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        print(f"localpipe: {command[0]}: {error.strerror}", file=sys.stderr)
        return 127


if __name__ == "__main__":
    sys.exit(main())
