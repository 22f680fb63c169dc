"""The undisturbed job, once for all faults."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Digests of the weights of the job without a fault, by schedule."""
    from harness import run_forked

    found = {}
    for kind in ("exact", "async"):
        results = run_forked(tmp_path_factory.mktemp(kind), [], settings={"schedule": {"kind": kind}})
        assert [result.exit_code for result in results] == [0, 0, 0], [result.stderr for result in results]
        found[kind] = results[0].value["weights_sha256"]
    assert found["exact"] != found["async"]
    return found
