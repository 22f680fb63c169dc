"""The files of a data set, in a directory or inside a tar file, read alike. Nothing is extracted to disk."""

from __future__ import annotations

import errno
import os
import posixpath
import tarfile
from pathlib import Path
from typing import Protocol

from pipeline.base.errors import ConfigError
from pipeline.data.decoding import IMAGE_SUFFIXES

GIB = 1 << 30
BLOCK = 512  # tar pads files to this many bytes
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstandard
SPLITS = {"train": ("train",), "test": ("test", "val")}
"""Directory names of a split; the first that is there counts."""
SPLIT_NAMES = tuple(name for names in SPLITS.values() for name in names)


class Files(Protocol):
    """Image files by their path below the root.

    Attributes:
        names: paths of image files, "/" between the parts.
        folders: paths of directories.
        random_access: whether ``read`` costs nothing to keep, however many files there are.
    """

    names: list[str]
    folders: set[str]
    random_access: bool

    def read(self, name: str) -> bytes:
        """The content of one file; safe to call from several threads."""


def is_image(name: str) -> bool:
    """By its suffix; hidden files (such as macOS's ``._x.jpg``) are none."""
    file = name.rpartition("/")[2]
    return file.lower().endswith(IMAGE_SUFFIXES) and not file.startswith(".")


class DirectoryFiles:
    """Files of the splits below a directory.

    Raises:
        ConfigError: a directory may not be read.
    """

    random_access = True

    def __init__(self, root: Path) -> None:
        self._root = root
        self.names: list[str] = []
        self.folders: set[str] = set()
        try:
            if not self._scan(""):
                for top in self._directories(""):
                    self._scan(f"{top}/")
        except OSError as error:
            raise ConfigError(f"data.root = '{root}' cannot be read: {_cause(error)}") from error

    def _directories(self, below: str) -> list[str]:
        with os.scandir(self._root / below) as entries:
            return [entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")]

    def _scan(self, top: str) -> bool:
        """Note what is in ``top``'s splits, and only there: a wrong root may be somebody's whole disk."""
        present = [f"{top}{split}" for split in self._directories(top) if split in SPLIT_NAMES]
        for split in present:
            self.folders.add(split)
            for label in self._directories(split):
                with os.scandir(self._root / split / label) as entries:
                    files = [f"{split}/{label}/{entry.name}" for entry in entries if entry.is_file()]
                self.names.extend(name for name in files if is_image(name))
        return bool(present)

    def read(self, name: str) -> bytes:
        """The content of one file."""
        return (self._root / name).read_bytes()


def _cause(error: OSError) -> str:
    """Which entry is at fault, why, and what to do about it."""
    where = f"'{error.filename}'" if error.filename is not None else "a directory"
    if error.errno == errno.ELOOP:
        return f"{where} is a symbolic link that leads back to itself; remove it, or let it lead to a file"
    fix = "check its permissions" if isinstance(error, PermissionError) else "check the disk"
    return f"{where}: {error.strerror}; {fix}"


class TarFiles:
    """Files of a tar archive, found in one pass over it.

    Of a compressed archive the (encoded) images are kept in memory, since it cannot be read at random; of an
    uncompressed one only their places are.

    Raises:
        ConfigError: damaged, or compressed and larger than ``budget`` bytes, or an image is a link.
    """

    def __init__(self, path: Path, budget: float) -> None:
        with path.open("rb") as file:
            self.random_access = not file.read(6).startswith(COMPRESSED)
        self._path = path
        self.folders: set[str] = set()
        self._content: dict[str, bytes | tuple[int, int]] = {}
        try:
            # "r|*" reads strictly forward: seeking back in a compressed stream decompresses it anew.
            with tarfile.open(path, "r:" if self.random_access else "r|*") as archive:
                self._scan(archive, budget)
        except (tarfile.TarError, EOFError, OSError) as error:
            raise ConfigError(
                f"data.root = '{path}' cannot be read as a tar file ({error}); it may be cut short, copy it "
                "again"
            ) from error
        self.names = list(self._content)

    def _scan(self, archive: tarfile.TarFile, budget: float) -> None:
        held = end = 0
        for member in archive:
            end = member.offset_data + (-(-member.size // BLOCK) * BLOCK if member.isfile() else 0)
            name = posixpath.normpath(member.name).lstrip("/")  # drops a leading "./", too
            folder = name if member.isdir() else posixpath.dirname(name)
            while folder and folder not in self.folders:  # not every tar file lists its directories
                self.folders.add(folder)
                folder = posixpath.dirname(folder)
            if member.isdir() or not is_image(name):
                continue
            if not member.isfile():
                raise ConfigError(
                    f"data.root = '{self._path}': '{name}' is a link, not an image; "
                    "pack the files themselves (tar --dereference --hard-dereference)"
                )
            if self.random_access:
                self._content[name] = (member.offset_data, member.size)
            else:
                held += member.size
                if held > budget:
                    raise ConfigError(
                        f"data.root = '{self._path}' is compressed and holds more than data.cache_gib = "
                        f"{budget / GIB:g}; extract it and set data.root to the directory, or raise "
                        "data.cache_gib"
                    )
                file = archive.extractfile(member)
                assert file is not None  # only of links and directories
                self._content[name] = file.read()
        if self.random_access and self._path.stat().st_size <= end:
            # tarfile takes this for the end; compressed archives end with a checksum, which was checked.
            raise tarfile.ReadError("no end marker")

    def read(self, name: str) -> bytes:
        """The content of one file."""
        content = self._content[name]
        if isinstance(content, bytes):
            return content
        start, size = content
        with self._path.open("rb") as file:
            file.seek(start)
            return file.read(size)
