"""Adapters side by side: each row computes under its own, and the tree is as wide as the adapters at work."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sampler_cases import adapter, ask, check, finish, merged, next_weights, run, same, shared, submit, tokens_of

from tinker_jax import lora
from tinker_jax.kernels.decode_attention import PAGE
from tinker_jax.sampling.adapter_slots import MOST_SLOT_RANK, AdapterSlots, describe
from tinker_jax.sampling.drawing import own_slots

SHAPES = {"a": (1, 4, ("attn", "mlp", "unembed")), "b": (2, 16, ("attn",)), "c": (3, 8, ("mlp", "unembed"))}


def width(tree):
    return jax.tree.leaves(tree)[0].shape[-1]


def joined(*names):
    slots = AdapterSlots()
    for name in names:
        slots.join(name, adapter(*SHAPES[name]))
    return slots


def effect(tree, span, x_MD, module="q_proj"):
    """What the rows of a span add to a linear of the first layer."""
    if module not in tree["layers"]:
        return jnp.zeros(())
    mask = own_slots(jnp.asarray([span]), width(tree))
    own = jax.tree.map(lambda factor: factor[0], tree["layers"][module])
    (update,) = lora.updates(x_MD, [own], jnp.broadcast_to(mask, (x_MD.shape[0], mask.shape[1])))
    return update


@pytest.mark.parametrize("module", ["q_proj", "up_proj"])
def test_each_adapter_among_others_does_what_it_does_alone_and_the_base_model_nothing(module):
    slots = joined("a", "b", "c")
    slots.join("base", None)
    tree = slots.tree()
    x_MD = np.random.default_rng(0).normal(size=(5, 32)).astype(np.float32)
    for name, shape in SHAPES.items():
        alone = adapter(*shape)
        expected = effect(alone, (0, width(alone)), x_MD, module)
        beside = effect(tree, slots.span(name), x_MD, module)
        np.testing.assert_allclose(beside, np.broadcast_to(expected, beside.shape), atol=1e-5)
    assert slots.span("base") == (0, 0)
    assert not np.any(effect(tree, (0, 0), x_MD, module))


def test_the_tree_is_as_wide_as_the_power_of_two_that_holds_the_ranks_and_narrows_when_half_is_empty():
    slots = joined("a", "b", "c")
    assert width(slots.tree()) == 32  # 4 + 16 + 8
    slots.leave("c")
    assert width(slots.tree()) == 32, "an adapter that leaves costs nothing"
    slots.leave("b")
    assert width(slots.tree()) == 8
    slots.leave("a")
    assert slots.tree() is None and not slots.names


def test_an_adapter_of_a_programs_own_width_is_used_as_it_is():
    slots, tree = joined("c"), adapter(*SHAPES["c"])
    assert slots.tree() is tree and slots.span("c") == (0, 8)


def test_adapters_fit_while_their_summed_rank_does():
    slots = AdapterSlots()
    half = adapter(9, MOST_SLOT_RANK // 2, ("unembed",))
    slots.join("one", half)
    assert slots.fits("two", half)
    slots.join("two", half)
    assert not slots.fits("three", adapter(1)) and slots.fits("one", half) and slots.fits("base", None)
    slots.leave("one")
    assert slots.fits("three", adapter(1))


def test_an_adapter_larger_than_all_slots_runs_alone():
    slots = AdapterSlots()
    assert slots.fits("huge", adapter(9, 2 * MOST_SLOT_RANK, ("unembed",)))


@pytest.mark.parametrize("at_work", [True, False])
def test_replaced_values_are_used_from_then_on(at_work):
    """Also when nobody used the name at that moment and its slot still lies in the tree."""
    slots = joined("a", "b")
    slots.tree()
    if not at_work:
        slots.leave("a")
    new = adapter(7, *SHAPES["a"][1:])
    slots.replace("a", new)
    if not at_work:
        slots.join("a", new)
    start, end = slots.span("a") if slots.tree() and slots.span("a") else (0, 0)
    np.testing.assert_array_equal(slots.tree()["layers"]["q_proj"]["a"][..., start:end], new["layers"]["q_proj"]["a"])


def test_adapters_that_share_programs_have_one_name():
    assert describe(adapter(1)) == describe(adapter(2)) != describe(adapter(1, 8))
    assert describe(adapter(1, 4, ("mlp",))) == "rank 4 on down_proj+gate_proj+up_proj"
    assert describe(None) == "base"


def test_an_adapter_that_is_not_finite_is_told_from_others():
    slots = AdapterSlots()
    assert slots.finite(adapter(1))
    for value in (np.nan, np.inf):
        broken = jax.tree.map(lambda x: x, adapter(1))
        broken["lm_head"] = {**broken["lm_head"], "b": broken["lm_head"]["b"].at[0, 0].set(value)}
        assert not slots.finite(broken)


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


def test_adapters_side_by_side_are_set_aside_and_one_without_room_waits():
    room, held = 10**9, []

    def reserve(size):
        if size > room:
            return False
        held.append(size)
        return True

    slots = AdapterSlots(reserve)
    slots.join("b", adapter(*SHAPES["b"]))
    assert slots.fits("c", adapter(*SHAPES["c"]))
    slots.join("c", adapter(*SHAPES["c"]))
    assert held[-1] == sum(leaf.nbytes for leaf in jax.tree.leaves(slots.tree())) > 0
    room = held[-1]
    assert not slots.fits("other", adapter(9, 64))
    slots.leave("c")
    slots.leave("b")
    assert held[-1] == 0
    assert slots.fits("other", adapter(9, 64)), "alone it lies where its sampler holds it"


def test_requests_of_an_adapter_without_room_beside_others_follow_them(monkeypatch):
    sampler = shared()
    names = [next_weights(), next_weights()]
    asked = [(ask(tokens_of(10), max_tokens=20, seed=n, stop=[]), name, adapter(n, 8)) for n, name in enumerate(names, 1)]
    expected = [finish(sampler, submit(sampler, *one))[0] for one in asked]
    monkeypatch.setattr(sampler._scheduler.slots, "_reserve", lambda size: size == 0)
    futures = [submit(sampler, *one) for one in asked]
    sampler.step()
    assert sampler._scheduler.slots.names == {names[0]} and sampler.waiting == 1
    for ours, theirs in zip(finish(sampler, *futures), expected, strict=True):
        same(ours, theirs)
