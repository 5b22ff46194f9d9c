"""Bytes that a compiled program reads and writes, from its HLO. XLA's own analysis counts a whole pool for each write to it."""

from __future__ import annotations

import collections
import functools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

_NO_BYTES = {"parameter", "constant", "bitcast", "tuple", "get-tuple-element", "partition-id", "after-all"}
_PARTS = {"slice", "dynamic-slice", "gather"}  # read as much as they give
_IN_PLACE = {"scatter": 2, "dynamic-update-slice": 1}  # write as much as this operand has
_HEAD = re.compile(r"(?:ENTRY )?%?(\S+) \(.*\{$")
_LINE = re.compile(r"\s+(?:ROOT )?%?(\S+) = (\(.*?\)|\S+) ([\w-]+)\((.*?)\)(.*)")


@dataclass(frozen=True)
class Instruction:
    name: str
    type: str
    op: str
    operands: tuple[str, ...]
    rest: str

    @property
    def bytes(self) -> int:
        """Of its result."""
        arrays = re.findall(r"(\w+)\[([\d,]*)\]", self.type)
        return sum(math.prod(int(n) for n in shape.split(",") if n) * _itemsize(kind) for kind, shape in arrays)

    def called(self, *attributes: str) -> list[str]:
        """Computations that it names under these attributes."""
        found = (re.search(rf"\b{attribute}=(\{{[^}}]*\}}|\S+)", self.rest) for attribute in attributes)
        return [name for match in found if match for name in re.findall(r"%([^\s,{}]+)", match[1])]


class Hlo:
    """A compiled program.

    A loop counts as often as its known trip count says, or once; of a conditional's branches the cheapest counts. Custom calls
    count for their small operands and results: what they read of arrays as large as `pool_bytes` is to be added by hand.
    """

    def __init__(self, text: str, pool_bytes: float) -> None:
        self._pool_bytes, self.computations = pool_bytes, dict(_computations(text))
        self.entry = re.search(r"^ENTRY %?(\S+)", text, re.MULTILINE)[1]  # pyright: ignore[reportOptionalSubscript]

    def loop_with(self, text: str) -> str:
        """The body of the outermost loop in which an instruction with this text lies."""
        bodies = [
            body
            for instructions in self.computations.values()
            for i in instructions.values()
            if i.op == "while"
            for body in i.called("body")
        ]
        inside = [body for body in bodies if any(text in i.rest for i in self._below(body))]
        return max(inside, key=lambda body: len(list(self._below(body))))

    def _below(self, computation: str) -> Iterator[Instruction]:
        for i in self.computations[computation].values():
            yield i
            for name in i.called("body", "calls", "to_apply", "branch_computations"):
                yield from self._below(name)

    @functools.cache  # noqa: B019
    def bytes(self, computation: str) -> int:
        """Read and written by one run of a computation."""
        return sum(self.bytes_of(computation, i) for i in self.computations[computation].values())

    def bytes_of(self, computation: str, i: Instruction) -> int:
        """Read and written by one instruction of a computation."""
        own = self.computations[computation]
        if i.op in _NO_BYTES:
            return 0
        if i.op == "while":
            trips = re.search(r'"known_trip_count":\{"n":"(\d+)"', i.rest)
            return sum(map(self.bytes, i.called("body", "condition"))) * (int(trips[1]) if trips else 1)
        if i.op == "conditional":
            return min(map(self.bytes, i.called("branch_computations", "true_computation", "false_computation")))
        if i.op == "call":
            return sum(map(self.bytes, i.called("to_apply")))
        if i.op == "custom-call":
            return i.bytes + sum(n for x in i.operands if (n := own[x].bytes) < self._pool_bytes)
        if i.op == "fusion":
            return self._fusion(i.called("calls")[0])
        if i.op in _PARTS:
            return 2 * i.bytes
        if i.op in _IN_PLACE:
            return 2 * own[i.operands[_IN_PLACE[i.op]]].bytes
        return i.bytes + sum(own[x].bytes for x in i.operands)

    def largest(self, computation: str) -> list[tuple[str, int]]:
        """Bytes of one run of a computation by kind of instruction and type of result, the largest first."""
        found: collections.Counter[str] = collections.Counter()
        for i in self.computations[computation].values():
            found[f"{i.name.rstrip('.0123456789')} {i.type}"] += self.bytes_of(computation, i)
        return found.most_common()

    def _fusion(self, computation: str) -> int:
        inside = self.computations[computation]
        users: dict[str, list[Instruction]] = {}
        for i in inside.values():
            for x in i.operands:
                users.setdefault(x, []).append(i)

        def read(name: str, whole: int) -> int:
            total = 0
            for user in users.get(name, []):
                if user.op in _PARTS and user.operands[0] == name:
                    total += user.bytes
                elif user.op == "bitcast":
                    total += read(user.name, whole)
                elif not (user.op in _IN_PLACE and user.operands[0] == name):
                    return whole
            return min(total, whole)

        def written(name: str) -> int:
            i = inside[name]
            if i.op == "tuple":
                return sum(map(written, i.operands))
            if i.op == "bitcast":
                return written(i.operands[0])
            return inside[i.operands[_IN_PLACE[i.op]]].bytes if i.op in _IN_PLACE else i.bytes

        root = [*inside][-1]
        return written(root) + sum(read(i.name, i.bytes) for i in inside.values() if i.op == "parameter")


def _itemsize(kind: str) -> int:
    """Bytes of a number of a type such as pred, s32, bf16 or f8e4m3fn."""
    bits = re.search(r"\d+", kind)
    return int(bits[0]) // 8 if bits else int(kind == "pred")


def _computations(text: str) -> Iterator[tuple[str, dict[str, Instruction]]]:
    """Each computation's instructions by name, in order; a root is the last."""
    name, lines = "", {}
    for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
        if match := _HEAD.match(line):
            name, lines = match[1], {}
        elif line.startswith("}"):
            yield name, lines
        elif name and (match := _LINE.match(line)):
            operands = tuple(re.findall(r"%([^\s,()]+)", match[4]))
            lines[match[1]] = Instruction(match[1], match[2], match[3], operands, match[5])
