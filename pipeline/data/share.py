"""Which samples a replica gets: of every batch its rows, of a test every R-th batch. Nobody reads those of others.

    batch of 8 on 1 replica     0 1 2 3 4 5 6 7       the order of an epoch is that of the data, by (seed, epoch),
    on 2                        0 1 2 3|4 5 6 7       so the batches are the same for every number of replicas
    a short one of 5 on 2       0 1 2|3 4
    test batches on 2           0 2 4|1 3
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Share:
    """That of replica ``index`` of ``of``."""

    index: int = 0
    of: int = 1

    def rows(self, count: int) -> slice:
        """Its consecutive rows of a batch of ``count``; the first replicas get the rest."""
        least, rest = divmod(count, self.of)
        start = self.index * least + min(self.index, rest)
        return slice(start, start + least + (self.index < rest))

    def batches(self, count: int) -> range:
        """Its batches of a test of ``count``."""
        return range(self.index, count, self.of)


WHOLE = Share()
