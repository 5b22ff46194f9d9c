"""Adapters side by side: each row computes under its own, and the tree is as wide as the adapters at work."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sampler_cases import adapter, ask, check, finish, merged, next_weights, run, same, shared, submit, tokens_of

from tinker_jax import lora
from tinker_jax.kernels.decode_attention import PAGE
from tinker_jax.sampling.adapter_slots import MOST_LANES, Lanes, describe
from tinker_jax.sampling.drawing import own_lanes

SHAPES = {"a": (1, 4, ("attn", "mlp", "unembed")), "b": (2, 16, ("attn",)), "c": (3, 8, ("mlp", "unembed"))}


def width(tree):
    return jax.tree.leaves(tree)[0].shape[-1]


def joined(*names):
    lanes = Lanes()
    for name in names:
        lanes.join(name, adapter(*SHAPES[name]))
    return lanes


def effect(tree, span, x_MD, module="q_proj"):
    """What the rows of a span add to a linear of the first layer."""
    if module not in tree["layers"]:
        return jnp.zeros(())
    mask = own_lanes(jnp.asarray([span]), tree)
    own = jax.tree.map(lambda factor: factor[0], tree["layers"][module])
    (update,) = lora.updates(x_MD, [own], jnp.broadcast_to(mask, (x_MD.shape[0], mask.shape[1])))
    return update


@pytest.mark.parametrize("module", ["q_proj", "up_proj"])
def test_each_adapter_among_others_does_what_it_does_alone_and_the_base_model_nothing(module):
    lanes = joined("a", "b", "c")
    lanes.join("base", None)
    tree = lanes.tree()
    x_MD = np.random.default_rng(0).normal(size=(5, 32)).astype(np.float32)
    for name, shape in SHAPES.items():
        alone = adapter(*shape)
        expected = effect(alone, (0, width(alone)), x_MD, module)
        beside = effect(tree, lanes.span(name), x_MD, module)
        np.testing.assert_allclose(beside, np.broadcast_to(expected, beside.shape), atol=1e-5)
    assert lanes.span("base") == (0, 0)
    assert not np.any(effect(tree, (0, 0), x_MD, module))


def test_the_tree_is_as_wide_as_the_power_of_two_that_holds_the_ranks_and_narrows_when_half_is_empty():
    lanes = joined("a", "b", "c")
    assert width(lanes.tree()) == 32  # 4 + 16 + 8
    lanes.leave("c")
    assert width(lanes.tree()) == 32, "a neighbour that leaves costs nothing"
    lanes.leave("b")
    assert width(lanes.tree()) == 8
    lanes.leave("a")
    assert lanes.tree() is None and not lanes.names


def test_an_adapter_of_a_programs_own_width_is_used_as_it_is():
    lanes, tree = joined("c"), adapter(*SHAPES["c"])
    assert lanes.tree() is tree and lanes.span("c") == (0, 8)


def test_no_more_lanes_than_there_are_room_for():
    lanes = Lanes()
    half = adapter(9, MOST_LANES // 2, ("unembed",))
    lanes.join("one", half)
    assert lanes.fits("two", half)
    lanes.join("two", half)
    assert not lanes.fits("three", adapter(1)) and lanes.fits("one", half) and lanes.fits("base", None)
    lanes.leave("one")
    assert lanes.fits("three", adapter(1))


def test_an_adapter_larger_than_all_lanes_runs_alone():
    lanes = Lanes()
    assert lanes.fits("huge", adapter(9, 2 * MOST_LANES, ("unembed",)))


@pytest.mark.parametrize("at_work", [True, False])
def test_replaced_values_are_used_from_then_on(at_work):
    """Also when nobody used the name at that moment and its lanes still lie in the tree."""
    lanes = joined("a", "b")
    lanes.tree()
    if not at_work:
        lanes.leave("a")
    new = adapter(7, *SHAPES["a"][1:])
    lanes.replace("a", new)
    if not at_work:
        lanes.join("a", new)
    start, end = lanes.span("a") if lanes.tree() and lanes.span("a") else (0, 0)
    np.testing.assert_array_equal(lanes.tree()["layers"]["q_proj"]["a"][..., start:end], new["layers"]["q_proj"]["a"])


def test_adapters_that_share_programs_have_one_name():
    assert describe(adapter(1)) == describe(adapter(2)) != describe(adapter(1, 8))
    assert describe(adapter(1, 4, ("mlp",))) == "rank 4 on down_proj+gate_proj+up_proj"
    assert describe(None) == "base"


def test_an_adapter_that_is_not_finite_is_told_from_others():
    lanes = Lanes()
    assert lanes.finite(adapter(1))
    for value in (np.nan, np.inf):
        broken = jax.tree.map(lambda x: x, adapter(1))
        broken["lm_head"] = {**broken["lm_head"], "b": broken["lm_head"]["b"].at[0, 0].set(value)}
        assert not lanes.finite(broken)


def test_rows_under_way_go_on_with_replaced_values_and_later_requests_share_nothing_of_the_old(monkeypatch):
    sampler, name = shared(), next_weights()
    p, new = tokens_of(PAGE + 8), adapter(2)
    running = submit(sampler, ask(p, max_tokens=40, stop=[], seed=1), name, adapter(1))
    sampler.step()
    sampler.replace(name, new)
    later = submit(sampler, ask(p, max_tokens=8, stop=[], seed=1), name, new)
    finish(sampler)
    check(merged(2), p, later.result(0))
    assert later.result(0).prompt_cache_hit_tokens == 0
    old = run(sampler, ask(p, max_tokens=40, stop=[], seed=1), weights="1", tree=adapter(1))[0].sequences[0]
    (sequence,) = running.result(0).sequences
    assert sequence.tokens[:16] == old.tokens[:16]
    np.testing.assert_allclose(sequence.logprobs_np[:16], old.logprobs_np[:16], atol=1e-5)
    assert np.abs(sequence.logprobs_np[16:] - old.logprobs_np[16:]).max() > 0.01
    again = run(sampler, ask(p, max_tokens=8, stop=[], seed=1), weights=name, tree=new)[0]
    assert again.prompt_cache_hit_tokens == PAGE
    same(again, later.result(0))
