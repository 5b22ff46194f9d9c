"""Thousands of random batches for every loss, right and wrong, against rules that are spelled out again in plain Python."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from odd_values import SCALARS, Odd, outcome

from tinker_jax.api.door import training_data
from tinker_jax.training.validate import check_data
from tinker_jax.types import Datum, ModelInput

VOCABULARY, CONTEXT = 20, 6

#: Required and optional inputs.
POLICY = ["target_tokens", "logprobs", "advantages"]
INPUTS = {
    "cross_entropy": (["target_tokens"], ["weights"]),
    "importance_sampling": (POLICY, []),
    "ppo": (POLICY, ["clip_low_threshold", "clip_high_threshold"]),
    "cispo": (POLICY, ["clip_low_threshold", "clip_high_threshold"]),
    "dro": (POLICY, []),
    "gspo": ([*POLICY, "sequence_ratio_mask"], ["clip_low_threshold", "clip_high_threshold"]),
    "stable_reinforce": (POLICY, ["clip_high_threshold"]),
}
CONFIG = {
    "ppo": {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2},
    "cispo": {"clip_low_threshold": 0.0, "clip_high_threshold": 4.0},
    "dro": {"beta": 0.05},
    "gspo": {"clip_low_threshold": 1 - 3e-4, "clip_high_threshold": 1 + 4e-4},
    "stable_reinforce": {"clip_high_threshold": 4.0, "kl_coeff": 0.0},
}
NAMES = sorted({name for required, optional in INPUTS.values() for name in [*required, *optional]})
CONTAINERS = {
    "list": lambda values, dtype: values,
    "numpy": lambda values, dtype: np.array(values, dtype),
    "jax": lambda values, dtype: jnp.array(np.array(values, dtype)),
    "torch": lambda values, dtype: torch.tensor(np.array(values, dtype)),
}


@dataclass
class Input:
    """One of `loss_fn_inputs`: nested lists, and in what they are handed over."""

    rows: list[Any]
    container: str = "list"
    dtype: str = "float32"

    @property
    def value(self) -> Any:
        return CONTAINERS[self.container](self.rows, self.dtype)


@dataclass
class Case:
    loss: str
    tokens: list[int]
    inputs: dict[str, Input] = field(default_factory=dict)
    config: dict[str, Odd] | None = None

    def check(self) -> None:
        inputs = {name: given.value for name, given in self.inputs.items()}
        data = [Datum(model_input=ModelInput.from_ints(self.tokens), loss_fn_inputs=inputs)]
        config = None if self.config is None else {key: odd.value for key, odd in self.config.items()}
        check_data(training_data(data), self.loss, config, vocab_size=VOCABULARY, context_length=CONTEXT)

    @property
    def right(self) -> bool:
        return self._right_loss() and self._right_tokens() and self._right_inputs()

    def _right_loss(self) -> bool:
        if self.loss not in INPUTS:
            return False
        defaults, given = CONFIG.get(self.loss, {}), self.config or {}
        numbers = all(
            odd.finite and abs(odd.number) < 3.4e38 and not odd.name.startswith(("Fraction", "Decimal", "ml_dtypes"))
            for odd in given.values()
        )
        return set(given) <= set(defaults) and numbers and self._ordered(*self._thresholds())

    def _thresholds(self) -> tuple[float, float]:
        merged = {**CONFIG.get(self.loss, {}), **{key: odd.number for key, odd in (self.config or {}).items()}}
        return merged.get("clip_low_threshold", -math.inf), merged.get("clip_high_threshold", math.inf)

    @staticmethod
    def _ordered(low: float, high: float) -> bool:
        return low <= high

    def _right_tokens(self) -> bool:
        return 1 <= len(self.tokens) <= CONTEXT and all(0 <= token < VOCABULARY for token in self.tokens)

    def _right_inputs(self) -> bool:
        required, optional = INPUTS[self.loss]
        if not set(required) <= set(self.inputs) <= {*required, *optional}:
            return False
        targets = self.inputs["target_tokens"]
        width = len(targets.rows[0]) if targets.rows and isinstance(targets.rows[0], list) else None
        if len(targets.rows) != len(self.tokens) or (width is not None and (self.loss != "cross_entropy" or width == 0)):
            return False
        for name, given in self.inputs.items():
            rows = given.rows if width is None else [cell for row in given.rows if isinstance(row, list) for cell in row]
            if any(isinstance(row, list) for row in given.rows) != (width is not None):
                return False
            if len(given.rows) != len(targets.rows) or len(rows) != len(self.tokens) * (width or 1):
                return False
            if given.container != "list" and given.dtype != ("int64" if name == "target_tokens" else "float32"):
                return False
            if name == "target_tokens" and not all(cell in range(VOCABULARY) for cell in rows):
                return False
            if any(isinstance(cell, list) or not math.isfinite(cell) for cell in rows):
                return False
        return self._right_positions()

    def _right_positions(self) -> bool:
        bounds = self._thresholds()
        lows, highs = (
            self.inputs[name].rows if name in self.inputs else [bound] * len(self.tokens)
            for name, bound in zip(("clip_low_threshold", "clip_high_threshold"), bounds, strict=True)
        )
        return all(low <= high for low, high in zip(lows, highs, strict=True))


def a_right_case(rng: random.Random) -> Case:
    loss = rng.choice(list(INPUTS))
    length = rng.randint(1, CONTEXT)
    width = rng.choice([None, None, 1, 3]) if loss == "cross_entropy" else None
    required, optional = INPUTS[loss]
    case = Case(loss, [rng.randrange(VOCABULARY) for _ in range(length)])
    for name in [*required, *(name for name in optional if rng.random() < 0.5)]:
        draw = (lambda: rng.randrange(VOCABULARY)) if name == "target_tokens" else _number_of(name, rng)
        rows = [draw() if width is None else [draw() for _ in range(width)] for _ in range(length)]
        dtype = "int64" if name == "target_tokens" else "float32"
        case.inputs[name] = Input(rows, rng.choice(list(CONTAINERS)), dtype)
    return case


def _number_of(name: str, rng: random.Random):
    low, high = {"clip_low_threshold": (-3, 0), "clip_high_threshold": (5, 8)}.get(name, (-8, 8))
    return lambda: rng.randint(low, high) / 4


def _drop(case: Case, rng: random.Random) -> None:
    case.inputs.pop(rng.choice(list(case.inputs)), None)


def _add(case: Case, rng: random.Random) -> None:
    name = rng.choice([*NAMES, "mask", "reward"])
    case.inputs.setdefault(name, Input([1.0] * len(case.tokens), "list" if name in NAMES else "numpy"))


def _resize(case: Case, rng: random.Random) -> None:
    given = rng.choice(list(case.inputs.values()))
    given.rows = rng.choice([given.rows[1:], [*given.rows, *given.rows[:1]], [[row] for row in given.rows], []])


def _bad_value(case: Case, rng: random.Random) -> None:
    given = rng.choice(list(case.inputs.values()))
    bad = rng.choice([math.nan, math.inf, -math.inf, 0.5, -1, VOCABULARY, 3, 0, 9.75, -9.75])
    if given.rows and isinstance(given.rows[0], list) and given.rows[0]:
        given.rows[0][0] = bad
    elif given.rows:
        given.rows[rng.randrange(len(given.rows))] = bad
    if isinstance(bad, float) and given.container != "list":
        given.dtype = "float32"


def _bad_dtype(case: Case, rng: random.Random) -> None:
    given = rng.choice(list(case.inputs.values()))
    cells = [cell for row in given.rows for cell in (row if isinstance(row, list) else [row])]
    finite = all(not isinstance(cell, list) and math.isfinite(cell) for cell in cells)
    given.container, given.dtype = (
        rng.choice(["numpy", "torch", "jax"]),
        rng.choice(["int64", "bool"] if finite else ["float32"]),
    )
    if given.dtype == "int64":
        given.rows = [[int(c) for c in row] if isinstance(row, list) else int(row) for row in given.rows]


def _bad_tokens(case: Case, rng: random.Random) -> None:
    case.tokens = rng.choice([[], [-1], [VOCABULARY], [1] * (CONTEXT + 1), [*case.tokens[1:], 0]])


def _config(case: Case, rng: random.Random) -> None:
    keys = [*CONFIG.get(case.loss, {}), rng.choice(["beta", "epsilon", "kl_coeff"])]
    case.config = {rng.choice(keys): rng.choice(SCALARS) for _ in range(rng.randint(0, 2))}


def _loss(case: Case, rng: random.Random) -> None:
    case.loss = rng.choice([*INPUTS, "reinforce", ""])


MUTATIONS = [_drop, _add, _resize, _bad_value, _bad_value, _bad_dtype, _bad_tokens, _config, _config, _loss]


@pytest.mark.parametrize("count", [1_000, pytest.param(5_000, marks=pytest.mark.slow)])
def test_random_batches_are_accepted_or_refused_by_name_as_the_rules_say(count):
    rng, passed = random.Random(count), 0
    for _ in range(count):
        case = a_right_case(rng)
        for mutate in rng.choices(MUTATIONS, k=rng.choice([0, 0, 1, 1, 2])):
            if case.inputs:
                mutate(case, rng)
        error = outcome(case.check)
        assert (error is None) == case.right, f"{case}: {'right' if case.right else 'wrong'}, but {error!r}"
        named = ("data[0]", "loss_fn", "loss_fn_config")
        assert error is None or any(name in str(error) for name in named), f"{case}: {error}"
        passed += error is None
    assert 0.3 * count < passed < 0.8 * count  # both halves of the rules are tried
