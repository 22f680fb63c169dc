"""The version, also checked between ranks before training starts."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

VERSION = "0.1.0"


@functools.cache  # the code of a process is what it has imported
def code_version() -> str:
    """``0.1.0+3f2a...``: the version and 12 hex digits of a SHA-256 over names and bytes of all code and recipes.

    Two checkouts of one version that differ anywhere in the package have different ones.
    """
    package = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for path in sorted([*package.rglob("*.py"), *package.rglob("*.toml")]):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(package).as_posix()} {len(content)}\n".encode() + content)
    return f"{VERSION}+{digest.hexdigest()[:12]}"
