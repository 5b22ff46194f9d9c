"""Thousands of random sampling requests, right and wrong, against rules that are spelled out again in plain Python."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import numpy as np
import pytest
import tiny
from odd_values import BY_NAME, INF, SCALARS, Odd, either, none, outcome, real, text, truth, whole

from tinker_jax.models.registry import parse as parse_config
from tinker_jax.sampling.requests import parse
from tinker_jax.types import ModelInput, SampleRequest, SamplingParams, TensorData
from tinker_jax.types._show import brief

CONTEXT = 40
CONFIG = dataclasses.replace(parse_config(tiny.CONFIGS["qwen3"]().to_dict()), context_length=CONTEXT)
VOCABULARY = CONFIG.V

#: Arguments with the rule of what each may be, whatever the others are.
PARAMS = {
    "max_tokens": either(none, whole(1)),
    "seed": either(none, whole(-(2**63), 2**64 - 1)),
    "stop": either(none, text),
    "temperature": real(0),
    "top_k": lambda odd: whole(-1)(odd) and odd.number != 0,
    "top_p": real(0, 1, without=[0]),
}
REQUEST = {
    "num_samples": whole(1),
    "prompt_logprobs": either(none, truth),
    "topk_prompt_logprobs": whole(0, VOCABULARY),
    "topk_sample_logprobs": whole(0, VOCABULARY),
    "prompt_alt_tokens_k": whole(0, 1024),
}
RIGHT = {
    "max_tokens": ["None", "1", "2", "7", "2**31"],
    "seed": ["None", "0", "-1", "2**63"],
    "stop": ["None", "'a'"],
    "temperature": ["0", "1.0", "0.5", "1e300", "1e-300", "jnp.array(0.5)"],
    "top_k": ["-1", "1", "7", "2**31"],
    "top_p": ["1", "0.5", "1e-300"],
    "num_samples": ["1", "2", "7"],
    "prompt_logprobs": ["None", "True", "False"],
    "topk_prompt_logprobs": ["0", "3"],
    "topk_sample_logprobs": ["0", "3"],
    "prompt_alt_tokens_k": ["0", "2"],
}


def _prompt(rng: random.Random) -> tuple[list[int], bool]:
    tokens = [rng.randrange(VOCABULARY) for _ in range(rng.choice([1, 2, 5, CONTEXT - 1, CONTEXT]))]
    match rng.randrange(12):
        case 0:
            tokens = []
        case 1:
            tokens[rng.randrange(len(tokens))] = rng.choice([-1, VOCABULARY, 2**40])
        case 2:
            tokens = [1] * (CONTEXT + 1)
    return tokens, 0 < len(tokens) <= CONTEXT and all(0 <= token < VOCABULARY for token in tokens)


def _stop(rng: random.Random) -> tuple[Any, bool]:
    ids = [rng.choice([0, 1, VOCABULARY - 1, VOCABULARY, -1, 2.0, 1.5]) if rng.random() < 0.3 else 5 for _ in range(3)]
    words = [rng.choice(["a", "\n", "", 3]) if rng.random() < 0.3 else "end" for _ in range(2)]
    if rng.random() < 0.5:
        return np.array(ids) if rng.random() < 0.3 else ids, all(i == int(i) and 0 <= i < VOCABULARY for i in ids)
    return words, all(isinstance(word, str) and word for word in words) or all(word == 3 for word in words)


def _targets(rng: random.Random, length: int) -> tuple[TensorData, bool]:
    """Dense or sparse; sometimes of another length, dtype or vocabulary, or with more columns than a position reports."""
    rows, columns = max(0, length - 1 + rng.choice([0, 0, 0, 1])), rng.choice([1, 3, 3, 1025])
    if rng.random() < 0.3:
        columns = rng.choice([3, 10**6])
        crow = [0, *[1] * rows] if rows else [0]
        tensor = TensorData([2] * (rows > 0), "int64", [rows, columns], crow, [0] * (rows > 0))
        return tensor, rows == length - 1 and columns <= 1024
    ids = np.array([[rng.choice([-1, 0, 7]) for _ in range(columns)] for _ in range(rows)], np.int64).reshape(rows, columns)
    right = rows == length - 1 and columns <= 1024
    if ids.size and rng.random() < 0.2:
        ids[0, 0], right = rng.choice([(VOCABULARY, False), (-2, False), (5, right)])
    dtype = rng.choice(["int64", "int64", "int64", "float32"])
    return TensorData(ids, dtype, [rows, columns]), right and dtype == "int64"


def _last_n(rng: random.Random, length: int, scored: bool) -> tuple[Any, bool]:
    odd = rng.choice(SCALARS)
    if rng.random() < 0.7:
        return rng.randint(1, max(1, length - 1)), scored and length > 1
    return odd.value, none(odd) or (scored and whole(1, length - 1)(odd))


@pytest.mark.parametrize("count", [1_000, pytest.param(3_000, marks=pytest.mark.slow)])
def test_random_requests_are_accepted_or_refused_by_name_as_the_rules_say(count):
    rng, passed = random.Random(count), 0
    for _ in range(count):
        tokens, right = _prompt(rng)
        broken = rng.choice([*PARAMS, *REQUEST]) if rng.random() < 0.3 else None
        params, request, given = {}, {}, {}
        for names, arguments in ((PARAMS, params), (REQUEST, request)):
            for name, rule in names.items():
                odd = rng.choice(SCALARS) if name == broken else BY_NAME[rng.choice(RIGHT[name])]
                arguments[name], given[name] = odd.value, odd
                right = right and rule(odd)
        if broken is None and rng.random() < 0.3:
            params["stop"], fine = _stop(rng)
            right = right and fine
        if rng.random() < 0.2:
            request["target_prompt_logprobs"], fine = _targets(rng, len(tokens))
            right = right and fine
        if rng.random() < 0.2:
            request["prompt_logprobs_last_n"], fine = _last_n(
                rng, len(tokens), given["prompt_logprobs"].name in ("True", "np.bool_(True)")
            )
            right = right and fine
        cache = rng.choice([CONTEXT, 2 * CONTEXT, len(tokens), len(tokens) + 4])

        def call(params=params, request=request, tokens=tokens, cache=cache):
            made = SampleRequest(prompt=ModelInput.from_ints(tokens), sampling_params=SamplingParams(**params), **request)
            return parse(made, CONFIG, [1], cache)

        error = outcome(call)
        shown = ", ".join(f"{name}={brief(value, 40)}" for name, value in (params | request).items())
        described = f"{len(tokens)} tokens, {shown}, cache {cache}"
        assert (error is None) == right, f"{described}: {'right' if right else 'wrong'}, but {error!r}"
        if error is None:
            _holds(call(), tokens, given, cache)
            passed += 1
        elif broken is not None and not (PARAMS | REQUEST)[broken](given[broken]):
            assert any(name in str(error) for name in (broken, "prompt")), f"{described}: {error}"
    assert 0.3 * count < passed < 0.8 * count  # both halves of the rules are tried


def _holds(request, tokens: list[int], given: dict[str, Odd], cache: int) -> None:
    room = CONTEXT - len(tokens) + 1
    most = given["max_tokens"].number
    expected = max(1, min(room, cache - len(tokens) + 1)) if most is None else min(most, room)
    assert request.max_tokens == expected and request.prompt.tolist() == tokens
    assert 0 <= request.temperature < INF and request.num_samples == given["num_samples"].number
