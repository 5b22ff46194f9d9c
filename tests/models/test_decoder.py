"""The decoder equals transformers' in float32, whole rows and token by token."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch

from tinker_jax import sharding
from tinker_jax.kernels.decode_attention import PAGE
from tinker_jax.models.caches import Caches
from tinker_jax.models.decoder import Decoder, unembedding
from tinker_jax.models.experts import Experts
from tinker_jax.models.weights import weights

T = 70  # beyond the llama3 test rope's original context of 32


def logits(cfg, params, h_MD):
    return jax.nn.log_softmax(h_MD @ unembedding(cfg, params).T, axis=-1)


@pytest.mark.parametrize(
    "family",
    [
        *(family for family in tiny.FAMILIES if family != "kimi_k2"),
        "llama untied",
        *(pytest.param(family, marks=pytest.mark.slow) for family in ("kimi_k2", "qwen3_moe mixed")),
    ],
)
def test_forward_and_extend_match_transformers(family):
    model = tiny.model(family)
    cfg, params = tiny.base_params(family, model)
    ids = np.random.default_rng(0).integers(0, tiny.VOCAB, (2, T))
    with torch.no_grad():
        expected = torch.log_softmax(model(torch.tensor(ids)).logits, -1).numpy()

    @jax.jit
    def whole(params, tokens):
        positions = jnp.broadcast_to(jnp.arange(T)[None], (2, T))
        h_MD, _ = Decoder(cfg, params).forward(tokens, positions, jnp.ones((2, T), jnp.int32))
        return logits(cfg, params, h_MD).reshape(2, T, -1)

    np.testing.assert_allclose(whole(params, ids), expected, atol=1e-4)

    caches = Caches(cfg, sharding.make_mesh(), jnp.float32)
    each, pages = 13, -(-T // PAGE)
    tables = np.array([[2 * w + r + 1 for w in range(pages)] for r in range(2)])  # interleaved
    # What was in the pages before is garbage that must not be seen.
    pool = jax.tree.map(lambda x: x.at[:].set(9.0), caches.empty(each))

    @partial(jax.jit, static_argnames="unstacked")
    def extend(params, tokens, positions, pool, unstacked):
        decoder = Decoder(cfg, params)
        layers = decoder.unstacked() if unstacked else None
        h_MD, pool = decoder.extend(tokens, positions, tables, pool, caches=caches, layers=layers)
        return logits(cfg, params, h_MD).reshape(*tokens.shape, -1), pool

    # A chunk, a shorter one beside a longer one, token by token; layers scanned and one by one.
    starts = np.zeros(2, int)
    for step, counts in enumerate([(30, 30), (30, 15), (1, 16), *[(1, 1)] * (T - 61)]):
        counts = np.array(counts)
        column = np.arange(counts.max())
        positions = np.where(column < counts[:, None], starts[:, None] + column, -1)
        tokens = np.take_along_axis(ids, np.maximum(positions, 0), axis=1)
        ours, pool = extend(params, tokens, positions, pool, unstacked=step > 0)
        for r in range(2):
            np.testing.assert_allclose(ours[r, : counts[r]], expected[r, starts[r] : starts[r] + counts[r]], atol=1e-4)
        starts += counts
    assert starts.tolist() == [T, T]


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_bfloat16_weights_stay_close_to_float32(family):
    model = tiny.model(family)
    cfg, params = tiny.base_params(family, model)
    exact = {w.name for w in weights(cfg) if w.exact}
    ids = np.random.default_rng(0).integers(0, tiny.VOCAB, (1, 40))
    positions, segments = jnp.arange(40)[None], jnp.ones((1, 40), jnp.int32)

    def run(dtype):
        cast = {k: jnp.asarray(v, jnp.float32 if k in exact else dtype) for k, v in params.items()}
        h_MD, _ = Decoder(cfg, cast).forward(ids, positions, segments)
        assert h_MD.dtype == dtype
        return np.asarray(logits(cfg, cast, h_MD).astype(jnp.float32))

    assert np.abs(run(jnp.bfloat16) - run(jnp.float32)).mean() < 0.1


@pytest.mark.parametrize("dtype", [jnp.float32, pytest.param(jnp.bfloat16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", [family for family in tiny.FAMILIES if family not in tiny.DENSE])
def test_sampling_chooses_the_experts_that_training_chooses(family, dtype, monkeypatch, record_property):
    model = tiny.model(family)
    cfg, params = tiny.base_params(family, model)
    exact = {w.name for w in weights(cfg) if w.exact}
    params = {k: jnp.asarray(v, jnp.float32 if k in exact else dtype) for k, v in params.items()}
    chosen, choose = [], Experts._choose

    def recorded(self, *args):
        weights_MK, ids_MK = choose(self, *args)
        jax.debug.callback(lambda ids: chosen.append(np.sort(ids, axis=-1)), ids_MK, ordered=True)
        return weights_MK, ids_MK

    monkeypatch.setattr(Experts, "_choose", recorded)
    ids = np.random.default_rng(0).integers(0, tiny.VOCAB, (1, T))

    @jax.jit
    def whole(params, tokens):
        h_MD, _ = Decoder(cfg, params).forward(tokens, jnp.arange(T)[None], jnp.ones((1, T), jnp.int32))
        return logits(cfg, params, h_MD).astype(jnp.float32)

    trained = whole(params, ids)
    jax.effects_barrier()
    layers = len(chosen)
    caches = Caches(cfg, sharding.make_mesh(), dtype)
    pool, tables = caches.empty(4), np.arange(1, 1 + -(-T // PAGE))[None]

    @jax.jit
    def extend(params, tokens, positions, pool):
        h_MD, pool = Decoder(cfg, params).extend(tokens, positions, tables, pool, caches=caches)
        return logits(cfg, params, h_MD).astype(jnp.float32), pool

    sampled = []
    for first in range(0, T, 10):
        part, pool = extend(params, ids[:, first : first + 10], np.arange(first, first + 10)[None], pool)
        sampled.append(part)
    jax.effects_barrier()
    in_training, in_sampling = np.stack(chosen[:layers]), np.stack(chosen[layers:]).reshape(T // 10, layers, 10, -1)
    differ = (in_training != in_sampling.transpose(1, 0, 2, 3).reshape(in_training.shape)).any(-1)
    gap = np.take_along_axis(np.abs(np.concatenate(sampled) - trained)[:-1], ids.T[1:], axis=-1)
    record_property("family", family)
    record_property(f"choices of experts that differ, {dtype.__name__}", float(differ.mean()))
    record_property(f"mean difference of log-probabilities, {dtype.__name__}", float(gap.mean()))
    assert layers > 0 and differ.mean() <= (0 if dtype == jnp.float32 else 0.1)
    assert gap.mean() < (1e-4 if dtype == jnp.float32 else 0.1)


def test_rematerialisation_changes_memory_and_not_the_gradient():
    model = tiny.model("qwen3")
    cfg, params = tiny.base_params("qwen3", model)
    ids = np.random.default_rng(0).integers(0, tiny.VOCAB, (1, 64))
    positions, segments = jnp.arange(64)[None], jnp.ones((1, 64), jnp.int32)

    def gradient(remat):
        def loss(params):
            return Decoder(cfg, params).forward(ids, positions, segments, remat=remat)[0].sum()

        compiled = jax.jit(jax.grad(loss)).lower(params).compile()
        return compiled(params), compiled.memory_analysis().temp_size_in_bytes

    kept, kept_bytes = gradient("none")
    recomputed, recomputed_bytes = gradient("full")
    assert recomputed_bytes < kept_bytes
    for name, g in kept.items():
        np.testing.assert_allclose(g, recomputed[name], atol=1e-4 * max(1.0, float(np.abs(g).max())))
