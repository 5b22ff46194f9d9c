"""Every family samples as transformers computes it: greedily, under adapters side by side, and on a mesh."""

from functools import cache

import jax
import numpy as np
import pytest
import tiny
import torch
from families import EVERY, merged
from sampler_cases import adapter, ask, check, device_alone, finish, make, model, placed, run, submit, tokens_of

from tinker_jax import lora, memory
from tinker_jax.models.decoder import in_order

LENGTHS = (1, 2, 9, 15, 33, 63, 64, 65, 70, 127, 128, 200)


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize("family", EVERY)
def test_greedy_tokens_are_those_of_transformers_generate(family, record_property):
    reference, sampler, gaps = model(family)[0], make(family), []
    for p in map(tokens_of, LENGTHS):
        (response,) = run(sampler, ask(p, temperature=0, max_tokens=24, stop=[], prompt_logprobs=True))
        generated = reference.generate(torch.tensor([p]), max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert response.sequences[0].tokens == generated[0, len(p) :].tolist()
        gaps.append(check(reference, p, response))
    record_property("family", tiny.family_of(family))
    record_property("log-probabilities in sampling", max(gaps))
    record_property("greedy prompt lengths", len(LENGTHS))


class Merged:
    """A transformers model with an adapter folded in, for `check`."""

    def __init__(self, family, tree):
        reference, cfg, _ = model(family)
        factors = jax.tree.map(lambda x: torch.tensor(np.array(x)), tree)
        self._model, self._state = reference, merged(cfg, reference, factors, 1.0)

    def __call__(self, ids):
        return torch.func.functional_call(self._model, self._state, (ids,), tie_weights=False)


def tree_of(family, seed):
    """Experts share factors in the first adapter, and none in the second."""
    return adapter(seed, rank=3, groups=("attn", "mlp" if seed == 1 else lora.PER_EXPERT, "unembed"), family=family)


@cache
def reference(family, seed):
    return model(family)[0] if seed is None else Merged(family, tree_of(family, seed))


def check_side_by_side(sampler, family, atol=1e-4):
    """Adapters of both forms and the base model in one batch, prompts of several chunks and pages among them.

    Returns the largest difference of log-probabilities.
    """
    gaps = []
    asks = [(seed, tokens_of(n)) for seed in (None, 1, 2) for n in (5, 130)]
    futures = []
    for seed, prompt in asks:
        tree = None if seed is None else placed(sampler, tree_of(family, seed))
        request = ask(prompt, max_tokens=6, seed=1, stop=[], prompt_logprobs=True)
        futures.append(submit(sampler, request, "base" if seed is None else seed, tree))
    for (seed, prompt), response in zip(asks, finish(sampler, *futures), strict=True):
        assert len(response.sequences[0].tokens) == 6
        gaps.append(check(reference(family, seed), prompt, response, atol=atol))
    return max(gaps)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3", *map(slow, ["llama", "qwen2", "qwen3", "kimi_k2"])])
def test_rows_under_different_adapters_have_the_log_probabilities_of_their_own(family, record_property):
    gap = check_side_by_side(make(family), family)
    record_property("family", family)
    record_property("log-probabilities in sampling under adapters", gap)


@pytest.mark.parametrize("family", ["gpt_oss", slow("qwen3_moe"), slow("deepseek_v3")])
def test_one_program_for_the_whole_model_gives_the_same(family):
    check_side_by_side(device_alone(family=family), family)


@pytest.mark.parametrize(
    "family, axes", [slow("qwen3_moe", {"expert": 2, "tensor": 2}), ("deepseek_v3", {"expert": 4, "tensor": 2})]
)
def test_a_mesh_gives_the_same(family, axes):
    check_side_by_side(make(family, mesh=tuple(axes.items())), family)


def test_the_latent_cache_holds_one_vector_a_token():
    _, cfg, _ = model("deepseek_v3")
    assert memory.token_bytes(cfg, 2) == len(in_order(cfg)) * (22 + 6) * 2
    sampler = make("deepseek_v3", pages=4)
    sampler.allocate()
    (pool,) = sampler._runner._pages
    assert sum(x.nbytes for x in jax.tree.leaves(pool)) == 5 * 64 * memory.token_bytes(cfg, 4)
