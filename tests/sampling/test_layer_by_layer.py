"""Programs of a few layers: no copies of weights, the same programs at any depth, rounded up while others compile."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from tinker_jax import lora, sharding
from tinker_jax.kernels.decode_attention import PAGE
from tinker_jax.models.registry import parse
from tinker_jax.models.rope import Rope
from tinker_jax.models.weights import lora_targets, weights
from tinker_jax.programs import Program
from tinker_jax.sampling.drawing import DrawOptions, Rows, nothing_drawn
from tinker_jax.sampling.layer_by_layer import LayerByLayer, _newest
from tinker_jax.sampling.model_runner import _PATIENCE, _WORTH, Chunk, ModelRunner
from tinker_jax.sampling.page_pool import pages_for
from tinker_jax.sampling.whole_model import WholeModel

# Sizes whose layers begin at multiples of 64 bytes, as those of real models do.
CONFIG = dataclasses.replace(parse(tiny.CONFIGS["qwen3"]().to_dict()), D=64, F=128, N=4, K=2, H=16, V=256, rope=Rope(16, 1e4))
RANK = 8
WIDTH = pages_for(CONFIG.context_length)
PLAIN = DrawOptions()


def runner(depth=3, pages=9):
    cfg = dataclasses.replace(CONFIG, L=depth)
    rng = np.random.default_rng(0)
    params = {w.name: jnp.asarray(rng.normal(size=w.full_shape).astype(np.float32) * 0.2) for w in weights(cfg)}
    return ModelRunner(cfg, params, sharding.make_mesh(), jnp.float32, pages, False), params


def adapter(depth=3):
    cfg = dataclasses.replace(CONFIG, L=depth)
    tree = lora.init(0, lora_targets(cfg), RANK, ("attn", "mlp"))
    return jax.tree.map(lambda x: jnp.asarray(x + 0.05), tree)


def rows(S, live, position=5):
    out = Rows.empty(S, WIDTH)
    out.live[:live], out.position[:], out.remaining[:] = True, position, 100
    out.table[:, 0], out.slots[:] = np.arange(1, S + 1), (0, RANK)
    out.temperature[:] = 0
    return out


def layers_of(calls):
    """Of all calls, in order."""
    return [layer for _, _, layers in calls for layer in layers]


def test_a_layers_weights_and_factors_are_views_of_their_stack():
    run, params = runner()
    model, tree = run._model, adapter()
    assert isinstance(model, LayerByLayer)
    model._use(tree)
    for at, (weights_here, own) in enumerate(
        zip(*(layers_of(calls) for calls in (model._weights, model._factors)), strict=True)
    ):
        for name, x in weights_here.items():
            assert x.unsafe_buffer_pointer() == np.asarray(params[f"layers.{name}"])[at].ctypes.data, name
        stacked = tree["layers"]
        for module, factors in own.items():
            for factor in ("b",) if any(module in names for names in model._cfg.groups[0][0].block.same_input) else ("a", "b"):
                assert factors[factor].unsafe_buffer_pointer() == np.asarray(stacked[module][factor])[at].ctypes.data, module
        for first, *others in model._cfg.groups[0][0].block.same_input:
            side_by_side = np.concatenate([stacked[name]["a"][at] for name in (first, *others)], axis=-1)
            np.testing.assert_array_equal(own[first]["a"], side_by_side)
            assert not any("a" in own[name] for name in others)
    assert model._ends["embed.embedding"].unsafe_buffer_pointer() == params["embed.embedding"].unsafe_buffer_pointer()


@pytest.mark.parametrize("depth, each", [(1, 1), (3, 3), (4, 4), (7, 1), (30, 3), (28, 4)])
def test_a_program_has_as_many_layers_as_divide_the_depth(depth, each):
    run, _ = runner(depth, pages=1)
    assert [len(layers) for _, _, layers in run._model._weights] == [each] * (depth // each)


def test_a_step_copies_no_weight():
    """Neither layers nor the draw copy a weight, and layers move no more than 1.3 times their weights and their pages."""
    S = 2
    # Wide enough that weights and pages outweigh activations, as they do in real models.
    wide = dataclasses.replace(CONFIG, L=2, D=512, F=1024, N=8, K=2, H=64, V=8192, rope=Rope(64, 1e4))
    params = {w.name: jnp.zeros(w.full_shape) for w in weights(wide)}
    run = ModelRunner(wide, params, sharding.make_mesh(), jnp.float32, 5, False)
    model, batch_rows = run._model, rows(S, S)
    h, batch = jax.eval_shape(lambda *args: model._embed_tokens(*args, rank=None), model._ends, *_newest(batch_rows))
    drawn = nothing_drawn(S, 16, 0)
    _, _, own = model._weights[0]
    pools = jax.eval_shape(lambda: run._empty(5))
    layer = jax.jit(model._run_layers, static_argnames="group", donate_argnums=(3, 4)).lower(
        own, ({}, {}), np.int32(0), h, pools, batch_rows.table, batch, group=0
    )
    draw = jax.jit(model._draw_tokens, static_argnames="filters", donate_argnums=(3, 4, 5)).lower(
        model._ends, None, h, batch, batch_rows._replace(table=None), drawn, np.int32(0), filters=True
    )

    def nbytes(tree):
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))

    weight_bytes, page_bytes = nbytes(own), wide.L * 2 * wide.K * wide.H * PAGE * 4
    for lowered, least in ((layer, weight_bytes), (draw, wide.V * wide.D * 4)):
        compiled = lowered.compile()
        copies = [line for line in compiled.as_text().splitlines() if " copy(" in line]
        copied = [line for line in copies if any(f"[{shape}]" in line for shape in _matrices(wide))]
        assert not copied, copied
        assert compiled.memory_analysis().temp_size_in_bytes < 0.3 * least
    # Of the draw the compiler counts the whole embedding for the rows that it takes out of it.
    accessed: dict = layer.compile().cost_analysis()
    assert accessed["bytes accessed"] <= 1.3 * (weight_bytes + 2 * S * page_bytes)


def _matrices(cfg):
    stacked = [w.shape for w in weights(cfg) if len(w.shape) == 2]
    return {",".join(map(str, shape)) for shape in stacked} | {",".join(map(str, shape[::-1])) for shape in stacked}


def test_a_deeper_model_needs_no_more_programs():
    counts = []
    for depth in (2, 7):
        run, _ = runner(depth)
        run.read(run.decode(adapter(depth), rows(2, 2), PLAIN))
        counts.append(run.programs)
    assert counts[0] == counts[1]


def test_layer_by_layer_draws_what_the_whole_model_in_one_program_draws():
    run, params = runner()
    whole, _ = runner()
    cfg = dataclasses.replace(CONFIG, L=3)
    whole._model = WholeModel(cfg, params, whole._caches, 16, unstack=False)
    tree, some = adapter(), rows(4, 3)
    one, other = run.read(run.decode(tree, some, DrawOptions(top=4))), whole.read(whole.decode(tree, some, DrawOptions(top=4)))
    np.testing.assert_array_equal(one.count, [16, 16, 16, 0])
    np.testing.assert_array_equal(one.count, other.count)
    np.testing.assert_array_equal(one.tokens[:3], other.tokens[:3])
    np.testing.assert_allclose(one.logprobs[:3], other.logprobs[:3], atol=1e-5)
    np.testing.assert_allclose(one.top_logprobs[:3], other.top_logprobs[:3], atol=1e-5)


def test_a_chunk_ends_soon_after_its_last_row(monkeypatch):
    run, _ = runner()
    steps, call = [], Program.__call__

    def counted(program, *args, **options):
        steps.extend([1] * (program is run._model._draw))
        return call(program, *args, **options)

    monkeypatch.setattr(Program, "__call__", counted)
    some = rows(2, 2)
    some.remaining[:] = 3
    drawn = run.read(run.decode(adapter(), some, PLAIN))
    np.testing.assert_array_equal(drawn.count, [3, 3])
    assert len(steps) == 3
    stops = rows(2, 2)
    stops.stop_ids[:, 0] = drawn.tokens[:, 0]
    drawn = run.read(run.decode(adapter(), stops, PLAIN))
    np.testing.assert_array_equal(drawn.count, [1, 1])
    assert len(steps) == 3 + 2, "one step is on its way when the host hears of the stops"


def test_a_larger_batch_serves_until_the_right_one_is_worth_compiling():
    run, _ = runner()
    tree, sizes = adapter(), [2, 4, 8]
    assert run.shape_to_use(sizes, 1, tree, PLAIN) == (2, WIDTH), "nothing is there yet: it is compiled now"
    run.read(run.decode(tree, rows(8, 8), PLAIN))
    assert not run._seconds, "the time of a compilation is not that of a call"
    assert run.shape_to_use(sizes, 1, tree, PLAIN) == (8, WIDTH), "nothing is known of what it takes"
    run.read(run.decode(tree, rows(8, 8), PLAIN))
    (took,) = run._seconds
    run._seconds[took] = 0.8 * _WORTH  # of it three quarters for nothing
    assert run.shape_to_use(sizes, 1, tree, PLAIN) == (8, WIDTH)
    assert len(run._model._draw._compiled) == 1, "nothing is compiled for short work"
    assert run.shape_to_use(sizes, 1, tree, PLAIN) == (8, WIDTH)
    for program in (run._model._layers, run._model._draw, run._model._embed):
        assert len(program._compiled) == 2
        for compiled in list(program._compiled.values()):
            compiled.result(60)
    assert run.shape_to_use(sizes, 1, tree, PLAIN) == (2, WIDTH)
    assert run.shape_to_use(sizes, 1, None, PLAIN) == (2, WIDTH), "another adapter shape has programs of its own"
    run._seconds[took] = 2 * _WORTH
    assert run.shape_to_use([1, 8], 1, tree, PLAIN) == (1, WIDTH), "one call for nothing would take longer than a compilation"


def test_prefill_compiles_meanwhile_what_decoding_will_need():
    run, _ = runner()
    chunk = Chunk(np.arange(5, dtype=np.int32), 0, [1], (0, RANK))
    run.prefill(adapter(), [chunk], PAGE, WIDTH, then=([2, 4], 1, PLAIN))
    assert all(len(program._compiled) == n for program, n in ((run._model._draw, 1), (run._model._layers, 2)))


def test_other_numbers_of_rows_prefill_until_the_right_one_is_worth_compiling():
    run, _ = runner()
    tree, sizes = adapter(), [1, 2, 4, 8]
    chunk = Chunk(np.arange(5, dtype=np.int32), 0, [1], (0, RANK))
    assert run.prefill_shape_to_use(sizes, 4, 1, 64, tree) == (4, WIDTH), "nothing is there yet: it is compiled now"
    run.prefill(tree, [chunk] * 8, 64, WIDTH)
    assert run.prefill_shape_to_use(sizes, 4, 1, 64, tree) == (8, WIDTH)
    assert run.prefill_shape_to_use(sizes, 1, 1, 64, tree) == (1, WIDTH), "eight times the rows cost more than a compilation"
    run.prefill(tree, [chunk], 64, WIDTH)
    for _ in range(_PATIENCE - 1):
        assert run.prefill_shape_to_use(sizes, 4, 1, 64, tree) == (1, WIDTH), "more calls, no row for nothing"
    assert len(run._model._layers._compiled) == 3
    for compiled in list(run._model._layers._compiled.values()):
        compiled.result(60)
    assert run.prefill_shape_to_use(sizes, 4, 1, 64, tree) == (4, WIDTH)
