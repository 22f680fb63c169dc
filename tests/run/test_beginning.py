"""What a rank refuses before step 0."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline.base.errors import ConfigError
from pipeline.run.beginning import refuse_private_directory


def ranks_that_see(seen: list[bool]) -> SimpleNamespace:
    """The team on rank 0; this rank's own look is the first."""
    return SimpleNamespace(gather=lambda mine: [mine, *seen], broadcast=lambda value: value)


def test_a_run_directory_that_other_machines_do_not_see_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.toml").touch()
    refuse_private_directory(ranks_that_see([True, True]), tmp_path)
    with pytest.raises(ConfigError, match=r"of rank 0 is not visible on rank 1, 3; .* use --run-dir on a file system"):
        refuse_private_directory(ranks_that_see([False, True, False]), tmp_path)
    with pytest.raises(ConfigError, match="not visible on rank 0"):
        refuse_private_directory(ranks_that_see([True]), tmp_path / "elsewhere")
