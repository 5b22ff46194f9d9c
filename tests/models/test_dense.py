"""The decoder equals transformers' in float32, whole rows and token by token."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch

from tinker_jax import sharding
from tinker_jax.kernels.decode_attention import PAGE, paged_attention_on
from tinker_jax.kernels.heads import Heads
from tinker_jax.models import dense

T = 70  # beyond the llama3 test rope's original context of 32


def logits(cfg, params, h_MD):
    return jax.nn.log_softmax(h_MD @ dense.unembedding(cfg, params).T, axis=-1)


@pytest.mark.parametrize("family", tiny.CONFIGS)
def test_forward_and_extend_match_transformers(family):
    model = tiny.model(family)
    cfg, params = tiny.base_params(family, model)
    ids = np.random.default_rng(0).integers(0, tiny.VOCAB, (2, T))
    with torch.no_grad():
        expected = torch.log_softmax(model(torch.tensor(ids)).logits, -1).numpy()

    @jax.jit
    def whole(params, tokens):
        positions = jnp.broadcast_to(jnp.arange(T)[None], (2, T))
        h_MD = dense.Decoder(cfg, params).forward(tokens, positions, jnp.ones((2, T), jnp.int32))
        return logits(cfg, params, h_MD).reshape(2, T, -1)

    np.testing.assert_allclose(whole(params, ids), expected, atol=1e-4)

    paged = paged_attention_on(sharding.make_mesh(), Heads(cfg.N, cfg.K, cfg.H), jnp.float32)
    each, pages = 13, -(-T // PAGE)
    tables = np.array([[2 * w + r + 1 for w in range(pages)] for r in range(2)])  # interleaved
    # What was in the pages before is garbage that must not be seen.
    pool = jax.tree.map(lambda x: x.at[:].set(9.0), paged.empty(each * cfg.L))

    @partial(jax.jit, static_argnames="unstacked")
    def extend(params, tokens, positions, pool, unstacked):
        decoder = dense.Decoder(cfg, params)
        layers = decoder.unstacked() if unstacked else None
        h_MD, pool = decoder.extend(tokens, positions, tables, pool, paged=paged, layers=layers)
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


def test_bfloat16_weights_stay_close_to_float32():
    model = tiny.model("qwen3")
    cfg, params = tiny.base_params("qwen3", model)
    ids = np.random.default_rng(0).integers(0, tiny.VOCAB, (1, 40))
    positions, segments = jnp.arange(40)[None], jnp.ones((1, 40), jnp.int32)

    def run(dtype):
        cast = {k: jnp.asarray(v, dtype) for k, v in params.items()}
        h_MD = dense.Decoder(cfg, cast).forward(ids, positions, segments)
        assert h_MD.dtype == dtype
        return np.asarray(logits(cfg, cast, h_MD).astype(jnp.float32))

    assert np.abs(run(jnp.bfloat16) - run(jnp.float32)).mean() < 0.1


def test_rematerialisation_changes_memory_and_not_the_gradient():
    model = tiny.model("qwen3")
    cfg, params = tiny.base_params("qwen3", model)
    ids = np.random.default_rng(0).integers(0, tiny.VOCAB, (1, 64))
    positions, segments = jnp.arange(64)[None], jnp.ones((1, 64), jnp.int32)

    def gradient(remat):
        def loss(params):
            return dense.Decoder(cfg, params).forward(ids, positions, segments, remat=remat).sum()

        compiled = jax.jit(jax.grad(loss)).lower(params).compile()
        return compiled(params), compiled.memory_analysis().temp_size_in_bytes

    kept, kept_bytes = gradient("none")
    recomputed, recomputed_bytes = gradient("full")
    assert recomputed_bytes < kept_bytes
    for name, g in kept.items():
        np.testing.assert_allclose(g, recomputed[name], atol=1e-4 * max(1.0, float(np.abs(g).max())))
