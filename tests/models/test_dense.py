"""The decoder equals transformers' in float32, whole rows and token by token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch

from tinker_jax.models import dense

T = 70  # beyond the llama3 test rope's original context of 32


def logits(cfg, params, h_MD):
    return jax.nn.log_softmax(h_MD @ dense.unembedding(cfg, params).T, axis=-1)


@pytest.mark.parametrize("family", tiny.CONFIGS)
def test_forward_and_decode_match_transformers(family):
    model = tiny.model(family)
    cfg, params = tiny.base_params(family, model)
    ids = np.random.default_rng(0).integers(0, tiny.VOCAB, (2, T))
    with torch.no_grad():
        expected = torch.log_softmax(model(torch.tensor(ids)).logits, -1).numpy()

    @jax.jit
    def whole(params, tokens):
        positions = jnp.broadcast_to(jnp.arange(T)[None], (2, T))
        h_MD, cache = dense.Decoder(cfg, params).forward(tokens, positions, jnp.ones((2, T), jnp.int32), keep_cache=True)
        return logits(cfg, params, h_MD).reshape(2, T, -1), cache

    ours, cache = whole(params, ids)
    np.testing.assert_allclose(ours, expected, atol=1e-4)

    @jax.jit
    def step(params, tokens, position, cache):
        h_SD, cache = dense.Decoder(cfg, params).decode(tokens, jnp.full(2, position), cache)
        return logits(cfg, params, h_SD), cache

    # The cache is longer than the prompt, and what lies beyond it is garbage that must not be seen.
    past = dense.empty_cache(cfg, 2, 96, jnp.float32)
    past = dense.Cache(*(x.at[:].set(9.0).at[:, :, :, :60].set(new[:, :, :, :60]) for x, new in zip(past, cache, strict=True)))
    for position in range(60, T):
        ours, past = step(params, ids[:, position], position, past)
        np.testing.assert_allclose(ours, expected[:, position], atol=1e-4)


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
