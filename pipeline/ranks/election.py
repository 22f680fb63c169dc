"""Which rank tells why the run ends.

The neighbours of a dead rank fail too (connection closed) and must not each print their own story: who comes first to
the key ``failure`` in the store does. Invariant: a process that leaves because of a failure has stood for election
first, so a process that is gone without a failure key in the store has died without a message (SIGKILL, out of memory).
"""

from __future__ import annotations

import contextlib
import json

from pipeline.base.errors import MARK
from pipeline.ranks import launcher
from pipeline.ranks.keys import Key
from pipeline.ranks.peers import Peers


def is_over(peers: Peers) -> bool:
    """Whether a rank has been elected already."""
    return peers.has(Key.FAILURE())


def elected(peers: Peers, refused: bool) -> bool:
    """Stand for election; ``refused``: the launcher is to try nothing again."""
    if peers.store is None:
        return launcher.elected()
    ballot = json.dumps({"rank": peers.rank, "host": peers.me.host, "launcher": peers.launcher, "refused": refused})
    if not is_over(peers) and not peers.store_gone:
        with contextlib.suppress(RuntimeError):
            return peers.store.compare_set(Key.FAILURE(), "", ballot) == ballot.encode()
        peers.store_gone = True
    # No vote is possible without a store. Its host lingers after a report (see exit.py), so we would have seen the
    # failure key: the host died without a message. The lowest other rank of every machine tells.
    here = [rank for rank in range(peers.size) if rank not in (peers.store_host, *peers.elsewhere())]
    return peers.store_gone and peers.rank == min(here)


def code_of_loser(peers: Peers, code: int) -> int:
    """0 where the launcher of this rank sees the one that has told why fail: it would list this one in seven more
    lines. Else the launcher learns from this one, too, that a refusal is final."""
    if not launcher.watches() or not is_over(peers):
        return code
    verdict = json.loads(peers.get(Key.FAILURE()))
    if (verdict["host"], verdict["launcher"]) == (peers.me.host, peers.launcher):
        return 0
    if verdict["refused"]:
        launcher.tell(f"{MARK}rank {peers.rank} has ended with the others", refused=True)
    return code
