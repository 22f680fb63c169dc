"""Which samples a replica gets: of every batch its rows, of a test every R-th batch. Nobody reads those of others.

    batch of 8 on 1 replica     0 1 2 3 4 5 6 7       the order of an epoch is that of the data, by (seed, epoch),
    on 2                        0 1 2 3|4 5 6 7       so the batches are the same for every number of replicas
    a short one of 5 on 2       0 1 2|3 4
    test batches on 2           0 2 4|1 3
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.base.errors import ConfigError


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

    def check_short(self, name: str, rows: int, least: int) -> None:
        """Whether the last batch of an epoch, of ``rows``, or 0 if it is as long as the others, gives every one of
        several replicas ``least`` of them. It is not left out for that: the epoch would be another one.

        Raises:
            ConfigError: it does not.
        """
        if self.of > 1 and 0 < rows < least * self.of:
            raise ConfigError(
                f"the last batch of an epoch of '{name}' has {rows} rows, too few for {self.of} replicas; set "
                "data.drop_last=true, or use another data.batch_size"
            )

    def batches(self, count: int) -> range:
        """Its batches of a test of ``count``."""
        return range(self.index, count, self.of)


WHOLE = Share()
