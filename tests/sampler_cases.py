"""What the tests of the sampler share: tiny models, samplers over them, requests, and what transformers says."""

from __future__ import annotations

import dataclasses
import itertools
from concurrent.futures import Future
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch

from tinker_jax import lora, memory, sharding
from tinker_jax.kernels.decode_attention import PAGE
from tinker_jax.models.weights import lora_targets, weights
from tinker_jax.programs import Program
from tinker_jax.sampling.page_pool import pages_for
from tinker_jax.sampling.sampler import Sampler
from tinker_jax.types import ModelInput, SampleRequest, SamplingParams

CONTEXT = 330  # a multiple of neither pages nor chunks
CHUNK = 64  # of a prefill on CPU
FEW = 2 * pages_for(CONTEXT)
EOS = 1
BORDERS = sorted({n + d for n in (16, PAGE, 2 * PAGE, CHUNK, 2 * CHUNK, 3 * CHUNK, 4 * CHUNK) for d in (-1, 0, 1, 2)})

_NAMES = itertools.count()


def next_weights():
    """A name of weights that no test has used: nothing is cached for it."""
    return f"weights {next(_NAMES)}"


def text(tokens):
    """One character for each token; the first are letters."""
    return "".join(chr(ord("a") + token) for token in tokens)


@cache
def model(family="qwen3"):
    """(transformers model, config, parameters)"""
    reference = tiny.model(family)
    cfg, params = tiny.base_params(family, reference)
    return reference, dataclasses.replace(cfg, context_length=CONTEXT), params


def make(family="qwen3", *, mesh=None, pages=1024, deterministic=False, stop_ids=(EOS,), decode_text=text, **change):
    """A sampler of its own, whose programs compile anew; `pages` of each part of the rows."""
    _, cfg, params = model(family)
    cfg = dataclasses.replace(cfg, **change)
    mesh = sharding.make_mesh(mesh and dict(mesh))
    placed = {w.name: jax.device_put(params[w.name], sharding.named(mesh, w.full_axes)) for w in weights(cfg)}
    return Sampler(
        cfg,
        placed,
        mesh=mesh,
        dtype=jnp.float32,
        kv_bytes=(pages + 1) * PAGE * memory.token_bytes(cfg, 4, sharding.parts(mesh, "kv_heads")),
        stop_ids=stop_ids,
        decode_text=decode_text,
        deterministic=deterministic,
    )


def device_alone(**settings):
    """`make`, with programs that cover the whole model, as on an accelerator."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "on_default_cpu", lambda mesh: False)
        return make(**settings)


@cache
def shared(**settings):
    """A sampler that tests share, so that its programs compile once; every test leaves it idle."""
    return make(**settings)


def small():
    """A shared sampler with room for two sequences as long as the context."""
    return shared(pages=FEW)


@cache
def adapter(seed, rank=4, groups=("attn", "mlp", "unembed"), family="qwen3"):
    """A scaled adapter, far from zero."""
    _, cfg, _ = model(family)
    tree = lora.init(seed, lora_targets(cfg), rank, groups)
    leaves, shape = jax.tree.flatten(tree)
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(shape, [jnp.asarray(x + rng.normal(size=x.shape).astype(np.float32) * 0.1) for x in leaves])


def placed(sampler, tree):
    """An adapter where a sampler's mesh wants it."""
    targets = [t for t in lora_targets(sampler._cfg) if t.module in (tree.get(t.stack, {}) if t.stack else tree)]
    axes = lora.logical_axes(targets, [group for target in targets for group in target.groups])
    mesh = sampler._runner._caches.mesh
    return jax.tree.map(lambda x, names: jax.device_put(x, sharding.named(mesh, names)), tree, axes)


@cache
def merged(tree_seed, rank=4, groups=("attn", "mlp", "unembed")):
    """The transformers model with `adapter(…)` folded in."""
    _, cfg, _ = model()
    other = tiny.model("qwen3")
    state, tree = other.state_dict(), adapter(tree_seed, rank, groups)
    for w in weights(cfg):
        if w.lora in ("attn", "mlp") and w.lora in groups:
            factors = tree["layers"][w.module]
            for layer in range(cfg.L):
                state[w.hf.format(layer=layer)] += torch.tensor(np.asarray(factors["a"][layer] @ factors["b"][layer]).T)
    if "unembed" in groups:
        state["lm_head.weight"] += torch.tensor(np.asarray(tree["lm_head"]["a"] @ tree["lm_head"]["b"]).T)
    other.load_state_dict(state)
    return other


def ask(prompt, num_samples=1, **kwargs):
    """A request; what is no field of it goes to its `SamplingParams`."""
    fields = {f.name for f in dataclasses.fields(SampleRequest)}
    params = SamplingParams(**{k: v for k, v in kwargs.items() if k not in fields})
    rest = {k: v for k, v in kwargs.items() if k in fields}
    return SampleRequest(prompt=ModelInput.from_ints(list(prompt)), num_samples=num_samples, sampling_params=params, **rest)


def submit(sampler, request, weights="base", tree=None):
    future = Future()
    sampler.submit(request, weights, tree, future)
    return future


def finish(sampler, *futures):
    """Steps until the sampler rests; the futures' results."""
    for _ in range(3000):
        if not sampler.step():
            break
    else:
        raise AssertionError("the sampler does not come to rest")
    assert_idle(sampler)
    return [future.result(timeout=0) for future in futures]


def run(sampler, *requests, weights="base", tree=None):
    return finish(sampler, *(submit(sampler, request, weights, tree) for request in requests))


def assert_idle(sampler):
    """Nothing is left of any request."""
    assert sampler.running == sampler.waiting == sampler.held_pages == 0
    assert not sampler._scheduler.slots.names


def whole_pages(tokens):
    """So many of the first tokens lie in full pages."""
    return tokens // PAGE * PAGE


def tokens_of(length, seed=0):
    """A random prompt."""
    return np.random.default_rng([seed, length]).integers(2, tiny.VOCAB, length).tolist()


@cache
def _reference_logits(reference, tokens):
    with torch.no_grad():
        return reference(torch.tensor([tokens])).logits[0].double()


def reference_logits(reference, tokens):
    return _reference_logits(reference, tuple(tokens))


def check(reference, prompt, response, temperature=1.0, atol=1e-5):
    """Log-probabilities of drawn tokens, at the temperature, and of the prompt, at 1, are those of the model.

    Returns the largest difference.
    """
    gaps = []

    def compare(ours, theirs):
        np.testing.assert_allclose(ours, theirs, atol=atol)
        gaps.append(np.abs(ours - theirs).max(initial=0.0))

    for sequence in response.sequences:
        logits = reference_logits(reference, [*prompt, *sequence.tokens[:-1]])
        expected = torch.log_softmax(logits[len(prompt) - 1 :] / temperature, -1).numpy()
        compare(sequence.logprobs_np, expected[np.arange(len(sequence.tokens)), sequence.tokens])
    if response.prompt_logprobs_np is not None:
        n = len(prompt) - 1
        expected = torch.log_softmax(logits[:n], -1).numpy()[np.arange(n), prompt[1:]]
        scored = ~np.isnan(response.prompt_logprobs_np[1:])
        compare(response.prompt_logprobs_np[1:][scored], expected[scored])
    return float(max(gaps))


def same(a, b, atol=1e-5):
    """Equal tokens, and log-probabilities up to the last bits; `atol=0`: bitwise."""
    assert [s.tokens for s in a.sequences] == [s.tokens for s in b.sequences]
    pairs = [(x.logprobs_np, y.logprobs_np) for x, y in zip(a.sequences, b.sequences, strict=True)]
    if a.prompt_logprobs_np is not None and b.prompt_logprobs_np is not None:
        pairs.append((a.prompt_logprobs_np, b.prompt_logprobs_np))
    for x, y in pairs:
        np.testing.assert_allclose(x, y, atol=atol, rtol=0)


OUT_OF_MEMORY = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 2544929920 bytes.")


def failing(patch, name, calls):
    """The program of that name has no room at these calls of it."""
    real, count = Program.__call__, [0]

    def call(program, *args, **options):
        if program.name == name:
            count[0] += 1
            if count[0] - 1 in calls:
                raise OUT_OF_MEMORY
        return real(program, *args, **options)

    patch.setattr(Program, "__call__", call)
    return count


def spy(monkeypatch, target, name):
    """Positional arguments of each call of a method, which goes on as before."""
    calls, method = [], getattr(target, name)
    monkeypatch.setattr(target, name, lambda *args, **options: calls.append(args) or method(*args, **options))
    return calls
