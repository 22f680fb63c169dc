"""A command of launch/: what its ``main`` raises becomes one line and an exit code, on one rank of a job.

    0     done, or stopped by a signal in order
    1     failed      2  refused (a key, a file) before anything was done      130  ctrl-C

Nothing here imports torch: in the seconds that takes, signals are noted already (see :class:`StartUp`).
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable

from pipeline.base.errors import ConfigError, InUseError, LocalpipeError, is_noted, line_of
from pipeline.ranks import launcher
from pipeline.ranks.start_up import StartUp

SIGTERM_S = 5.0
"""Within which torchrun ends the other ranks once one has ended."""


def command(main: Callable[[], int], *, trains: bool = False) -> int:
    """Run ``main`` and return the exit code of the process.

    Args:
        main: returns an exit code.
        trains: a signal before the run begins is noted, and stops the run at once when it has begun; what has been
            refused is not tried again by torchrun's ``--max-restarts``.
    """
    start_up = StartUp()
    if trains:
        start_up.begin()
        launcher.register()
    try:
        if trains and launcher.refused_before():
            return _leave_to_the_first(start_up)
        return main()
    except BaseException as error:
        if not _is_told(error):
            raise
        line, refused = line_of(error), isinstance(error, ConfigError) and not isinstance(error, InUseError)
        if os.environ.get("RANK", "0") == "0":
            print(line, file=sys.stderr, flush=True)
        launcher.tell(line, refused)
        if isinstance(error, KeyboardInterrupt):
            return 130
        if isinstance(error, LocalpipeError) and not error.reported:
            return _leave_to_the_first(start_up)
        return error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1
    finally:
        start_up.end()


def _leave_to_the_first(start_up: StartUp) -> int:
    """The exit code of a rank where all refuse the same. torchrun lists every rank that fails, in seven lines each: the
    others let the first one do, and leave when torchrun tells them to. The first one waits until all of them can be
    told: torchrun's signal would end one that has no handler yet, and that one would be listed."""
    end = time.monotonic() + SIGTERM_S
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    others = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) - 1
    while launcher.watches() and time.monotonic() < end:
        if start_up.noted and not first:
            return 0
        if first and len(launcher.siblings()) >= others:
            break
        time.sleep(0.02)
    return 2


def _is_told(error: BaseException) -> bool:
    """Whether a line says all of ``error``; of what nobody expected Python shows the traceback."""
    return isinstance(error, LocalpipeError | KeyboardInterrupt) or is_noted(error)
