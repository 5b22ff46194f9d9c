"""Values that callers pass by mistake or by right, each labelled by hand with what it is: the oracle of the fuzzers."""

from __future__ import annotations

import enum
import math
import random
from collections import UserList, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import torch

from tinker_jax.types.errors import TinkerError

INF = math.inf


class _Three(enum.IntEnum):
    THREE = 3


class _NoRepr:
    def __repr__(self) -> str:
        raise ZeroDivisionError


class _NoEquality:
    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        raise ZeroDivisionError


def _nested(depth: int) -> list:
    made: list = []
    for _ in range(depth):
        made = [made]
    return made


_NAMES = {
    **{"np": np, "jnp": jnp, "torch": torch, "ml_dtypes": ml_dtypes, "Fraction": Fraction, "Decimal": Decimal, "Path": Path},
    **{"UserList": UserList, "deque": deque, "datetime": datetime, "UTC": UTC, "nested": _nested, "nan": math.nan, "inf": INF},
    **{"Three": _Three, "NoRepr": _NoRepr, "NoEquality": _NoEquality},
}


@dataclass(frozen=True)
class Odd:
    """A value, as the expression that makes it.

    Attributes:
        number: the real number that it stands for, infinite where no float holds it; None: it is none.
        whole: it may stand where an integer is due.
        truth: True or False, of Python or NumPy.
        text: a string, empty or not.
        scalar: neither a container nor an array.
    """

    name: str
    number: float | None = None
    whole: bool = False
    truth: bool = False
    text: bool = False
    scalar: bool = False

    @property
    def value(self) -> Any:
        return eval(self.name, dict(_NAMES))

    @property
    def finite(self) -> bool:
        return self.number is not None and math.isfinite(self.number)


def _whole(*names: str, scalar: bool = True, number: float | None = None) -> list[Odd]:
    return [Odd(n, int(eval(n, dict(_NAMES))) if number is None else number, whole=True, scalar=scalar) for n in names]


def _other(*names: str, **labels: Any) -> list[Odd]:
    return [Odd(name, **labels) for name in names]


ODD = [
    *_whole("0", "1", "2", "3", "7", "-1", "2**31", "2**62", "2**63", "2**64 - 1", "2**64", "-2**63", "-2**63 - 1"),
    *_whole("0.0", "1.0", "2.0", "-1.0", "np.int8(3)", "np.uint64(2**63)", "np.float32(2)", "np.longdouble(2)", "Three.THREE"),
    *_whole("10**400", "10**5000", number=INF),
    *_whole("-10**400", number=-INF),
    *_whole("np.array(2)", "np.array(2.0)", "jnp.array(2)", "torch.tensor(2)", "torch.tensor(2.0)", scalar=False, number=2),
    *_whole("jnp.bfloat16(2)", "torch.tensor(2, dtype=torch.bfloat16)", scalar=False, number=2),
    *_other("0.5", "np.float16(0.5)", "np.float64(0.5)", "ml_dtypes.bfloat16(0.5)", number=0.5, scalar=True),
    *_other("Fraction(1, 2)", "Decimal('0.5')", number=0.5, scalar=True),
    *_other("np.array(0.5)", "jnp.array(0.5)", "torch.tensor(0.5)", number=0.5),
    *_other("Fraction(2)", "Decimal(2)", number=2, scalar=True),
    Odd("2.5", 2.5, scalar=True),
    Odd("-0.5", -0.5, scalar=True),
    Odd("1e-300", 1e-300, scalar=True),
    Odd("1e300", 1e300, whole=True, scalar=True),
    *_other("nan", "np.float64(nan)", number=math.nan, scalar=True),
    *_other("inf", number=INF, scalar=True),
    *_other("-inf", number=-INF, scalar=True),
    *_other("True", "False", "np.bool_(True)", truth=True, scalar=True),
    *_other("'a'", "'1'", "'0.5'", "'float32'", "'sample'", "'x' * 20_000", "'~\\0'", "'\\ud800'", text=True, scalar=True),
    *_other("''", "np.str_('a')", text=True, scalar=True),
    *_other("None", "1j", "np.complex64(1)", "np.timedelta64(5)", "np.datetime64('2026-01-01')", scalar=True),
    *_other("Decimal('NaN')", "Decimal('sNaN')", "Decimal('inf')", "b'a'", "object()", "len", "int", "...", scalar=True),
    *_other("NotImplemented", "ValueError('x')", "datetime.now(UTC)", "Path('.')", "NoRepr()", "NoEquality()", scalar=True),
    *_other("np.array(True)", "np.array('x')", "np.array(None)", "torch.tensor(True)", "jnp.array(True)"),
    *_other("torch.tensor(0.5, requires_grad=True)", "torch.ones(2, requires_grad=True)"),
    *_other("np.arange(3)", "np.array([0.5])", "np.array([1])", "np.zeros((2, 2))", "np.zeros(0)", "np.array([True])"),
    *_other("np.array(['a'])", "np.array([None])", "np.array([1j])", "np.zeros(2, 'i4,f4')", "np.uint8([1, 2])"),
    *_other("jnp.arange(3)", "jnp.ones(2, jnp.bfloat16)", "jnp.ones(2, jnp.complex64)", "jnp.ones((2, 2))"),
    *_other("torch.arange(3)", "torch.ones(2, dtype=torch.bfloat16)", "torch.ones(2, dtype=torch.complex64)"),
    *_other("torch.eye(3).to_sparse()", "torch.empty(2, device='meta')", "torch.ones(2, 2)", "torch.ones(2) > 0"),
    *_other("[]", "[1]", "[1.5]", "['a']", "[None]", "[[1], [2, 3]]", "[[1, 2], [3, 4]]", "[1, 'a']", "nested(50)"),
    *_other("nested(5000)", "[0] * 100_000", "[2**63]", "[10**5000]", "[torch.ones(2, requires_grad=True)]", "[-1]"),
    *_other("(1, 2)", "()", "{}", "{'a': 1}", "{'a': 'b'}", "{1: 2}", "{1, 2}", "frozenset()", "range(3)", "deque([1])"),
    *_other("UserList([1])", "(x for x in [1])", "memoryview(b'a')", "bytearray(b'ab')"),
]
BY_NAME = {odd.name: odd for odd in ODD}
SCALARS = [odd for odd in ODD if odd.scalar]

Rule = Callable[[Odd], bool]


def named(*names: str) -> Rule:
    """One of these and nothing else."""
    assert set(names) <= set(BY_NAME), set(names) - set(BY_NAME)
    return lambda odd: odd.name in names


def anything(odd: Odd) -> bool:
    return True


def nothing(odd: Odd) -> bool:
    return False


def whole(low: int = -(2**63), high: int = 2**63 - 1) -> Rule:
    return lambda odd: odd.whole and odd.number is not None and low <= odd.number <= high


def real(low: float = -INF, high: float = INF, without: Iterable[float] = ()) -> Rule:
    return lambda odd: odd.finite and low <= odd.number <= high and odd.number not in without  # type: ignore[operator]


def truth(odd: Odd) -> bool:
    return odd.truth


def text(odd: Odd) -> bool:
    return odd.text and odd.name != "''"


def string(odd: Odd) -> bool:
    return odd.text


def either(*rules: Rule) -> Rule:
    return lambda odd: any(rule(odd) for rule in rules)


none = named("None")


def outcome(call: Callable[[], Any]) -> TinkerError | None:
    """The error with which the library refuses `call`, or None where it does not. Any other error is a failure of the test."""
    try:
        call()
    except TinkerError as error:
        assert len(str(error)) < 1000, f"{len(str(error))} characters: {str(error)[:1000]}"
        return error
    return None


def odd_list(rng: random.Random, good: list[Odd], odd: list[Odd], longest: int = 5) -> list[Odd]:
    """Mostly of `good`, so that about half of the lists are acceptable."""
    return [rng.choice(odd) if rng.random() < 0.15 else rng.choice(good) for _ in range(rng.randint(1, longest))]
