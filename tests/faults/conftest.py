"""The undisturbed job, once for all faults, in whichever worker of pytest-xdist asks first."""

from __future__ import annotations

import fcntl
import json
import os
import sys
from pathlib import Path

import pytest
from leftovers import TOGETHER

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Digests of the weights of the job without a fault, by schedule."""
    from harness import run_forked

    together = Path(os.environ[TOGETHER])
    with open(together / "undisturbed.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        known = together / "undisturbed.json"
        if not known.exists():
            found = {}
            for kind in ("exact", "async"):
                results = run_forked(tmp_path_factory.mktemp(kind), [], settings={"schedule": {"kind": kind}})
                assert [result.exit_code for result in results] == [0, 0, 0], [result.stderr for result in results]
                found[kind] = results[0].value["weights_sha256"]
            assert found["exact"] != found["async"]
            known.write_text(json.dumps(found))
        digests: dict[str, str] = json.loads(known.read_text())
        return digests
