"""Every key in the stores of a job, in one place, so that no two uses of a store can mean the same key.

    the store of one run in one attempt (Team.store)                 who sets it, and who reads it
        process/<rank>  failure  nonfinite/<rank>  left/<rank>       how ranks fail and leave: peers, election
        stop            beat/<rank>                                  what signals ask for; who is alive: heartbeat.py
        groups/...                                                   torch.distributed, for its process groups
        meet/<place>/<rank>  value/<name>/<rank>                     Team: meetings, and what all tell all
        epoch/<epoch>/<rank>  pulse/<rank>                           every rank, for rank 0: telemetry
        saving/<step>/<rank>  saved/<step>/<rank>                    every rank's saver, for that of rank 0
        summed/<what>/<rank>                                         twins that wait long for each other: twins.py
        clock/<ask|tell>/...                                         clocks of the ranks: clocks.py

    what all attempts of a run share (Team.remember)
        run_directory                                                rank 0, for its successor after a restart

    what all attempts of the job share
        hello/<rank>  roll  here/<attempt>/<rank>  go/<attempt>      who belongs to this attempt: attempt.py
        attempt/<attempt>/<run>/  job/<run>/                         the stores above are below these
"""

from __future__ import annotations

import enum


@enum.unique
class Key(enum.Enum):
    """A pattern of keys; called with its parts it gives one key: ``Key.EPOCH(epoch=3, rank=1)`` is ``"epoch/3/1"``."""

    PROCESS = "process/{rank}"
    FAILURE = "failure"
    NONFINITE = "nonfinite/{rank}"
    LEFT = "left/{rank}"
    STOP = "stop"
    BEAT = "beat/{rank}"
    GROUPS = "groups"
    MEET = "meet/{place}/{rank}"
    VALUE = "value/{name}/{rank}"
    EPOCH = "epoch/{epoch}/{rank}"
    PULSE = "pulse/{rank}"
    SAVING = "saving/{step}/{rank}"
    SAVED = "saved/{step}/{rank}"
    SUMMED = "summed/{what}/{rank}"
    CLOCK = "clock/{what}/{rank}/{index}"

    RUN_DIRECTORY = "run_directory"

    HELLO = "hello/{rank}"
    ROLL = "roll"
    HERE = "here/{attempt}/{rank}"
    GO = "go/{attempt}"
    ATTEMPT = "attempt/{attempt}/{run}"
    JOB = "job/{run}"

    def __call__(self, **parts: object) -> str:
        """The key. Raises KeyError if a part is missing."""
        return self.value.format(**parts)
