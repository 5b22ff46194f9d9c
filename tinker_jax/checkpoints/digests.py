"""SHA-256 of a checkpoint's files, in a list beside them that `sha256sum -c SHA256SUMS` reads too.

The list lies with the data, not in the store's record: a copied directory can be verified too, and the functions that read the
data need not know the store.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tinker_jax.types.errors import StorageError

if TYPE_CHECKING:
    from etils import epath

SUMS = "SHA256SUMS"
_LINE = re.compile(r"([0-9a-f]{64})  (\S.*)")
_BLOCK = 1 << 20
_REMEDY = "Restore the checkpoint from a copy, or use another one."


def write_sums(directory: epath.Path) -> None:
    """Lists every file below a directory. Files are read in pieces; nothing is held in memory."""
    lines = [f"{sha256(directory / name)}  {name}\n" for name in _files(directory, "")]
    (directory / SUMS).write_text("".join(lines))


def verify(directory: epath.Path, parts: Collection[str]) -> bool:
    """Holds the files of some parts of a checkpoint against its list.

    What else lies in the directory does not matter. Within the parts a file that is not listed is refused like one that is
    missing: orbax reads arrays by what it finds there, and the list itself may have been cut short.

    Args:
        directory: with the list.
        parts: names of files and directories in it that are going to be read.

    Returns:
        Whether there is a list.

    Raises:
        StorageError: a file is missing, surplus, changed or unreadable; the message names it.
    """
    try:
        listed = _read_sums(directory / SUMS)
        if listed is None:
            return False
        expected = {name: digest for name, digest in listed.items() if name.partition("/")[0] in parts}
        there = {name for part in parts for name in _files(directory, part)}
        if missing := sorted(expected.keys() - there):
            raise StorageError(
                f"{directory / missing[0]} is missing ({len(missing)} of {len(expected)} files that were saved are). {_REMEDY}"
            )
        if surplus := sorted(there - expected.keys()):
            raise StorageError(
                f"{directory / surplus[0]} is not among the files that were saved ({len(surplus)} are not). "
                f"Remove it if {SUMS} is whole; else restore the checkpoint from a copy."
            )
        for name, digest in expected.items():
            if sha256(directory / name) != digest:
                raise StorageError(f"{directory / name} is damaged: its SHA-256 is not the one in {SUMS}. {_REMEDY}")
    except StorageError:
        raise
    except OSError as error:
        where = getattr(error, "filename", None) or directory
        raise StorageError(f"cannot read {where}: {error.strerror or error}. {_REMEDY}") from error
    return True


def sha256(file: epath.Path | Path) -> str:
    """Digest of a file's bytes, as 64 hexadecimal digits.

    Raises:
        OSError: it cannot be read.
    """
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _files(directory: epath.Path, name: str) -> Iterator[str]:
    """Paths below `directory`, with slashes, of the files in its part `name`, or of that file itself; sorted."""
    place = directory / name if name else directory
    # A link is a file here: what it leads to may be anywhere, or the directory that it lies in.
    if place.is_dir() and not (name and os.path.islink(place)):
        for child in sorted(child.name for child in place.iterdir()):
            yield from _files(directory, f"{name}/{child}" if name else child)
    elif os.path.lexists(place) or place.exists():  # the first of these sees links that lead nowhere, the other object stores
        yield name


def _read_sums(file: epath.Path) -> dict[str, str] | None:
    try:
        data = file.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        lines = data.decode("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise StorageError(f"{file} is damaged: not UTF-8 (byte {error.start}). {_REMEDY}") from error
    listed = {}
    for number, line in enumerate(lines, 1):
        match = _LINE.fullmatch(line)
        if match is None:
            raise StorageError(f"{file} is damaged: line {number} is no SHA-256 and file name. {_REMEDY}")
        listed[match[2]] = match[1]
    return listed
