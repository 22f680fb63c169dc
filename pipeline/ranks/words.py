"""The words of the line about a failure: where a rank was, what it did, what happened to it."""

from __future__ import annotations

import contextlib
import traceback
from pathlib import Path

from pipeline.base.errors import ConfigError, LocalpipeError
from pipeline.ranks.heartbeat import Heartbeat
from pipeline.ranks.peers import Peers

Place = tuple[int, int, str]
"""Epoch, step (-1 before the first) and what the rank was at."""
LONGEST = 800
"""Characters of an error's own text that are told."""


def where(place: Place) -> str:
    """``" at epoch 1 step 2"``"""
    epoch, step, _ = place
    return f" at epoch {epoch} step {step}" if step >= 0 else " before the first step"


def doing(rank: int, place: Place) -> str:
    """``"rank 1 was computing (epoch 1 step 2)"``"""
    epoch, step, activity = place
    return f"rank {rank} was {activity}" + (f" (epoch {epoch} step {step})" if step >= 0 else "")


def stopped_by_ctrl_c(place: Place) -> str:
    """The line of a rank that ctrl-C has ended."""
    return f"stopped by ctrl-C{where(place)}"


def own_story(error: BaseException, rank: int, module: str | None, place: Place, run_dir: Path | None) -> str:
    """What happened to a rank itself. The traceback goes to ``failure-rank<r>.txt`` in ``run_dir``; without one the
    story names file and line. A refusal needs neither."""
    text = str(error)
    if isinstance(error, ConfigError):
        return text
    if not isinstance(error, LocalpipeError):
        text = f"{type(error).__name__}: {text}"
    spot = traceback.extract_tb(error.__traceback__)[-1:]
    at = f" ({Path(spot[0].filename).name}:{spot[0].lineno})" if spot else ""
    if run_dir is not None:
        path = run_dir / f"failure-rank{rank}.txt"
        with contextlib.suppress(OSError):  # a full disk must not hide the cause
            run_dir.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(traceback.format_exception(error)))
            at = f" (traceback: {path})"
    if text.startswith("rank "):
        return text[:LONGEST] + at
    epoch, step, _ = place
    parts = [f"rank {rank}", module, f"epoch {epoch} step {step}" if step >= 0 else "before the first step"]
    return ", ".join(filter(None, parts)) + f": {text[:LONGEST]}{at}"


def line_for_the_dead(peers: Peers, heart: Heartbeat, witness: str, peer: int = -1) -> str:
    """The line for ranks that left no message.

    Args:
        witness: what this rank saw.
        peer: whom it lost, if it knows: on another machine it may not see more.
    """
    if peers.store is None:
        return witness
    dead = peers.dead()
    if peers.store_gone:  # then nobody can be told from one who left in order
        dead = [] if peers.store_host is None else [peers.store_host]
    if not dead:
        what = "the launcher has ended; " if peers.orphaned() else ""
        if peer >= 0 and not what:
            what = f"rank {peer} ({peers.modules(peer)}) is gone, its machine or its network; "
        return what + witness
    named = ", ".join(f"rank {rank} ({peers.modules(rank)})" for rank in dead)
    if heart.unanswered_s():
        return f"{named} does not answer (stopped? machine gone?); {witness}"
    return f"{named} died without a message (killed? out of memory?); {witness}"
