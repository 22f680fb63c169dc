"""The batches of an epoch of training, and what becomes of a short one at its end.

    10 samples in batches of 4    4 4 2      kept where every part of it has what a step needs, else left out
     9                            4 4 (1)
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.base.data_config import DataConfig
from pipeline.base.errors import ConfigError
from pipeline.data.share import Share


@dataclass(frozen=True)
class Epoch:
    """What an epoch consists of, over all replicas.

    Attributes:
        batches: their number.
        samples: in all of them.
        short: samples of the last one if it is short and kept, else 0.
        least: fewest samples of a short batch, as it is cut into micro-batches: where a network has BatchNorm two of
            each, of which there is no variance over one.
    """

    batches: int
    samples: int
    short: int
    least: int

    @classmethod
    def of(cls, count: int, batch_size: int, least: int, drop_last: bool = False) -> Epoch:
        """Of ``count`` samples; ``drop_last``: a short batch is left out."""
        whole, short = divmod(count, batch_size)
        kept = short if short >= least and not drop_last else 0
        return cls(whole + (kept > 0), whole * batch_size + kept, kept, least)

    def check(self, settings: DataConfig, count: int, share: Share) -> None:
        """Raises ConfigError: there is no batch in ``count`` samples, or the short one is too small for replicas."""
        if not self.batches:
            raise ConfigError(
                f"data.batch_size = {settings.batch_size} is larger than the {count} training images of "
                f"'{settings.name}'; use a smaller batch"
            )
        share.check_short(settings.name, self.short, self.least)
