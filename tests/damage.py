"""Ways to damage a file, drawn at random, and to put it back."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

SHAPES = ("flip a bit", "cut short", "delete", "append", "zero a stretch", "swap")


@contextlib.contextmanager
def damaged(rng: random.Random, file: Path, others: list[Path]) -> Iterator[str]:
    """Damages a file within the body, and tells how; `others` are files that it may change places with."""
    before = {path: path.read_bytes() for path in (file, *others)}
    how = rng.choice(SHAPES)
    data = bytearray(before[file])
    if how == "flip a bit" and data:
        at = rng.randrange(len(data))
        data[at] ^= 1 << rng.randrange(8)
        file.write_bytes(data)
        how = f"{how} of byte {at}"
    elif how == "cut short" and data:
        file.write_bytes(data[: rng.randrange(len(data))])
    elif how == "delete":
        file.unlink()
    elif how == "zero a stretch" and any(data):
        start = rng.choice([i for i, byte in enumerate(data) if byte])
        stop = start + rng.randrange(1, 64)
        data[start:stop] = bytes(len(data[start:stop]))
        file.write_bytes(data)
    elif how == "swap" and (different := [path for path in others if before[path] != before[file]]):
        other = rng.choice(different)
        file.write_bytes(before[other])
        other.write_bytes(before[file])
        how = f"{how} with {other}"
    else:
        how = "append"
        file.write_bytes(data + bytes(rng.randrange(256) for _ in range(rng.randrange(1, 40))))
    try:
        yield how
    finally:
        for path, content in before.items():
            if not path.exists() or path.read_bytes() != content:
                path.write_bytes(content)


def as_before_formats(home: Path) -> None:
    """Makes records and data what versions without formats and digests wrote."""
    for file in (home / "runs").rglob("*.json"):
        fields = json.loads(file.read_text())
        if file.name == "meta.json":
            del fields["digests"]
        else:
            for name in ("format", "record_sha256", "path", "superseded"):
                fields.pop(name, None)
        file.write_text(json.dumps(fields, indent=1))
    for file in (home / "runs").rglob("SHA256SUMS"):
        file.unlink()


def replace(place: Path, make: object) -> None:
    """Puts something that is no readable file under the name of a record: bytes, a directory or a link to itself."""
    if place.is_dir() and not place.is_symlink():
        shutil.rmtree(place)
    else:
        place.unlink(missing_ok=True)
    if isinstance(make, bytes):
        place.write_bytes(make)
    elif make == "directory":
        place.mkdir()
    elif make == "loop":
        place.symlink_to(place.name)
    else:
        assert make == "nothing"
