"""Before step 0: all ranks have the same configuration, or the keys are named in which they differ."""

from __future__ import annotations

import json
import tomllib

from pipeline.base.config import Config
from pipeline.base.errors import ConfigError
from pipeline.base.toml import to_toml
from pipeline.ranks.team import Team, holders

OWN_KEYS = ("runtime.device", "runtime.threads")
"""Keys that may differ between ranks: the machines of a job need not be alike."""
NAMED_KEYS = 3
"""Differing keys that a message names; it counts the others."""


def agree_on_config(team: Team, config: Config) -> None:
    """Refuse to start unless the configuration of every rank has the same values, but for OWN_KEYS. Collective, once.

    Raises:
        ConfigError: naming the differing keys, and who has which value.
        DeadlineExceeded: naming the ranks that did not answer.
    """
    everyone = [
        {
            f"{section}.{name}": json.dumps(value)
            for section, entries in tomllib.loads(text).items()
            for name, value in entries.items()
        }
        for text in team.collect("the configuration", to_toml(config))
    ]
    parts = []
    for key in dict.fromkeys(key for values in everyone for key in values):
        held = [values.get(key, "no such key") for values in everyone]
        if len(set(held)) > 1 and key not in OWN_KEYS:
            parts.append(f"{key}: {holders(held)}")
    if parts:
        more = [f"{len(parts) - NAMED_KEYS} more"] if len(parts) > NAMED_KEYS else []
        raise ConfigError("ranks disagree about " + ", and about ".join(parts[:NAMED_KEYS] + more))
