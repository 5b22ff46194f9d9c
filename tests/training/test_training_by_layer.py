"""Training layer by layer gives what the whole-model program gives, copies no weight, and is the same at any depth."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny

from tinker_jax import lora, sharding
from tinker_jax.losses import default_config
from tinker_jax.memory import POLICIES, Plan
from tinker_jax.models.weights import lora_targets, weights
from tinker_jax.programs import Program
from tinker_jax.training.layer_by_layer import LayerByLayer, _share
from tinker_jax.training.objective import Call
from tinker_jax.training.packing import pack
from tinker_jax.training.pending import complete
from tinker_jax.training.trainer import Trainer, groups
from tinker_jax.training.whole_model import WholeModel
from tinker_jax.types import LoraConfig

MESH = sharding.make_mesh()
RANK_8 = LoraConfig(rank=8)
PLACED = sharding.replicated(MESH)


def models(family, depth=None):
    """The same model both ways."""
    cfg, params = tiny.base_params(family, tiny.model(family))
    if depth is not None:
        cfg = dataclasses.replace(cfg, L=depth)
        params = {w.name: np.zeros(w.full_shape, np.float32) for w in weights(cfg)}
    params = {w.name: jax.device_put(params[w.name], PLACED) for w in weights(cfg)}
    add = Program(lambda total, new: jax.tree.map(jax.numpy.add, total, new), "add", donate=(1,))
    places = Trainer(cfg, params, MESH, Plan(512, "none", 1)).adapter_shardings
    return cfg, LayerByLayer(cfg, params, MESH, add), WholeModel(cfg, params, MESH, places, add)


def call_of(cfg, lengths, *, remat="none", backward=True, loss_fn="cross_entropy", config=RANK_8):
    rng = np.random.default_rng(0)
    tokens = [rng.integers(2, cfg.V, n).astype(np.int32) for n in lengths]
    extra = {"cross_entropy": ("weights",), "importance_sampling": ("logprobs", "advantages")}[loss_fn]
    inputs = [
        {"target_tokens": rng.integers(2, cfg.V, n).astype(np.int32)}
        | {k: rng.normal(size=n).astype(np.float32) - 2 for k in extra}
        for n in lengths
    ]
    trained = groups(config)
    adapter = lora.init(0, lora_targets(cfg), config.rank, trained)
    adapter = jax.tree.map(lambda x: x + 0.05 * rng.normal(size=x.shape).astype(np.float32), adapter)
    batches = pack(tokens, inputs, token_budget=256)
    values = default_config(loss_fn)
    adapter = jax.device_put(adapter, PLACED)
    return Call(adapter, 4.0, batches, loss_fn, values, backward, remat, trained, config.rank, at_once=512, one_program=False)


def run(model, call):
    return complete(model.run(call, lambda: False))


def close(ours, theirs, tolerance=2e-5):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * max(1, float(np.abs(b).max())))


@pytest.mark.parametrize(
    ("family", "loss_fn"),
    [
        *((family, "cross_entropy") for family in ("llama", "qwen2", "qwen3")),
        ("llama", "importance_sampling"),
        *(pytest.param(family, "importance_sampling", marks=pytest.mark.slow) for family in ("qwen2", "qwen3")),
    ],
)
def test_gradients_log_probabilities_and_metrics_are_those_of_the_whole_model(family, loss_fn):
    cfg, layers, whole = models(family)
    call = call_of(cfg, (200, 90, 150, 60), loss_fn=loss_fn)
    assert len(call.batches) == 3
    ours, theirs = run(layers, call), run(whole, call)
    close(ours, theirs)
    assert all(float(np.abs(x).max()) > 0 for x in jax.tree.leaves(ours[1]))


@pytest.mark.parametrize("flags", [{}, {"train_attn": False, "train_mlp": False}])
def test_log_probabilities_from_a_program_of_their_own_leave_everything_else_as_it_is(flags):
    cfg, layers, whole = models("qwen3")
    call = call_of(cfg, (100,), loss_fn="importance_sampling", config=LoraConfig(rank=8, **flags))
    expected = run(layers, call)
    for model in (layers, whole):
        close(run(model, dataclasses.replace(call, one_program=True)), expected)


@pytest.mark.parametrize("remat", POLICIES)
def test_every_policy_gives_the_same_gradients_and_keeps_what_it_says(remat, monkeypatch):
    cfg, layers, whole = models("qwen3")
    call, kept, forward = call_of(cfg, (200,), remat=remat), [], Program.__call__

    def recording(program, *args, **kwargs):
        out = forward(program, *args, **kwargs)
        kept.extend([out[1]] if program is layers._forward else [])
        return out

    with monkeypatch.context() as patch:
        patch.setattr(Program, "__call__", recording)
        ours = run(layers, call)
    close(ours[1], run(whole, call)[1])
    T, R, heads = 256, 8, (cfg.N * cfg.H, cfg.K * cfg.H, cfg.K * cfg.H)
    attention = [(1, T, cfg.N, cfg.H), (1, T, cfg.N, 1)]
    products = [(T, n) for n in (3 * R, *heads, R, cfg.D, 2 * R, cfg.F, cfg.F, R)]
    expected = {"none": attention + products, "attention": attention, "full": []}[remat]
    assert len(kept) == cfg.L and all(sorted(x.shape for x in own) == sorted(expected) for own in kept)


@pytest.mark.parametrize(
    "flags",
    [{"train_attn": False}, {"train_mlp": False, "train_unembed": False}, {"train_attn": False, "train_mlp": False}],
)
def test_any_part_of_the_modules_can_be_trained(flags):
    cfg, layers, whole = models("qwen2")
    call = call_of(cfg, (200, 90), config=LoraConfig(rank=8, **flags))
    close(run(layers, call), run(whole, call))


def test_a_forward_alone_keeps_nothing_and_has_no_gradients():
    cfg, layers, whole = models("llama")
    call = call_of(cfg, (200, 90, 100), backward=False)
    (ours, none), (theirs, _) = run(layers, call), run(whole, call)
    close(ours, theirs)
    assert none is None and layers._backward.count == 0


def test_micro_batches_side_by_side_give_the_same_bits_every_time():
    cfg, layers, _ = models("qwen3")
    call = call_of(cfg, (250, 240, 230, 200, 100, 90, 80))
    first, *others = (jax.tree.leaves(run(layers, call)) for _ in range(5))
    assert len(call.batches) > 3
    for other in others:
        assert all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("way", ["layers", "whole"])
def test_a_call_that_pauses_whenever_it_can_gives_the_same_bits(way):
    cfg, *models_ = models("qwen3")
    model, call = dict(zip(("layers", "whole"), models_, strict=True))[way], call_of(cfg, (250, 240, 230, 200, 120, 110, 60))
    at_rest, pauses, results = run(model, call), 0, []

    def whole():
        results.append((yield from model.run(call, lambda: True)))

    for _ in whole():
        pauses += 1
    for a, b in zip(jax.tree.leaves(at_rest), jax.tree.leaves(results), strict=True):
        assert np.array_equal(a, b)
    sizes = [batch.tokens.size for batch in call.batches]
    assert sizes == [256] * 5 + [128]
    assert pauses == (2 if way == "layers" else 5)  # two micro-batches side by side, or one


def test_a_call_that_is_closed_while_it_pauses_ends_there(monkeypatch):
    cfg, layers, _ = models("llama")
    call, begun, real = call_of(cfg, (250,) * 6), [], layers._micro_batch
    monkeypatch.setattr(layers, "_micro_batch", lambda *args: begun.append(1) or real(*args))
    work = layers.run(call, lambda: True)
    next(work)
    work.close()
    assert len(begun) == 2 and len(call.batches) == 6
    run(layers, call)  # nothing was left behind


def test_threads_share_the_tokens_and_depend_on_nothing_else():
    assert _share([1024], 2048) == [[], [0]]
    assert _share([1024, 512, 512, 128], 2048) == [[], [0, 3], [1, 2]]
    assert _share([512] * 5, 2048) == [[], [0, 2, 4], [1, 3]]


def test_micro_batches_of_which_two_do_not_fit_run_one_after_the_other():
    assert _share([2048, 1024, 512, 128], 2048) == [[0], [1], [2, 3]]
    assert _share([2048, 2048], 2048) == [[0, 1]]
    cfg, layers, whole = models("llama")
    call = call_of(cfg, (400, 200, 150))
    assert [batch.tokens.size for batch in call.batches] == [512, 256, 256]
    for at_once in (0, 512, 1024):
        close(run(layers, dataclasses.replace(call, at_once=at_once)), run(whole, call))


def test_weights_are_read_where_they_lie_and_gradients_are_added_in_place(monkeypatch):
    cfg, layers, _ = models("llama", depth=4)
    call, real, compiled, totals = call_of(cfg, (200,)), Program.__call__, [], []

    def recording(program, *args, shape, **static):
        if program is not layers._backward:
            return real(program, *args, shape=shape, **static)
        compiled.append(program._jit.lower(*args, **static).compile())
        before = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(args[0])]
        out = real(program, *args, shape=shape, **static)
        totals.append((before, [x.unsafe_buffer_pointer() for x in jax.tree.leaves(out[0])]))
        return out

    monkeypatch.setattr(Program, "__call__", recording)
    run(layers, call)
    assert (
        all(sorted(before) == sorted(after) for before, after in totals[1:]) and len(totals) == cfg.L
    )  # the first buffers are not always taken, and why is not known
    text = compiled[0].as_text()
    for matrix in (f"f32[{cfg.F},{cfg.D}]", f"f32[{cfg.D},{cfg.F}]"):
        assert matrix in text
        assert not [line for line in text.splitlines() if f"= {matrix}" in line and "copy" in line.split("=")[1]]


def test_there_is_as_much_to_compile_at_any_depth():
    texts = []
    for depth in (2, 8):
        cfg, layers, _ = models("qwen3", depth=depth)
        lowered, call = [], Program.__call__

        def trace(program, *args, shape, call=call, lowered=lowered, **static):
            lowered.append((program.name, program._jit.lower(*args, **static).as_text().count("\n")))
            return call(program, *args, shape=shape, **static)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Program, "__call__", trace)
            run(layers, call_of(cfg, (200,)))
        texts.append(sorted(set(lowered)))
        assert layers.programs == 4
    assert texts[0] == texts[1] and len(texts[0]) == 4


def test_an_error_on_one_thread_is_raised_when_the_other_has_ended(monkeypatch):
    cfg, layers, _ = models("llama")
    call, ended = call_of(cfg, (250, 240)), []
    real = layers._micro_batch

    def fails(call, adapter, batch, total):
        if batch is call.batches[0]:
            raise ZeroDivisionError
        out = real(call, adapter, batch, total)
        ended.append(1)
        return out

    with monkeypatch.context() as patch:
        patch.setattr(layers, "_micro_batch", fails)
        with pytest.raises(ZeroDivisionError):
            run(layers, call)
    assert ended == [1]
    run(layers, call)
