"""Paths are text in UTF-8 in a configuration, and bytes to the operating system.

Python turns between both with the encoding of the locale. Under ``LANG=C`` that can be ASCII (``PYTHONUTF8=0``): what
is no ASCII reaches ``sys.argv`` as surrogates, which are no text, and real text is no path. These functions go by
UTF-8 where the locale cannot say it.
"""

from __future__ import annotations

import os


def text_of(argument: str) -> str:
    """What the user typed, as text: an argument of the command line, its surrogates read as UTF-8 where they are."""
    try:
        return os.fsencode(argument).decode("utf-8")
    except UnicodeError:  # bytes that are no UTF-8 stay surrogates; text that the locale has no bytes for stays as is
        return argument


def is_text(path: str | os.PathLike[str]) -> bool:
    """Whether the bytes of a path are text in UTF-8."""
    try:
        os.fsencode(path).decode("utf-8")
    except UnicodeError:
        return False
    return True


def path_of(text: str) -> str:
    """A path of the configuration as the operating system's functions take it: the reverse of :func:`text_of`."""
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        return os.fsdecode(text.encode("utf-8"))
    return text
