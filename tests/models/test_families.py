"""Every family trains as transformers computes it."""

import jax
import numpy as np
import pytest
import tiny
import torch
from families import EVERY, merged, torch_factors

from tinker_jax import lora, memory, sharding
from tinker_jax.models.weights import lora_targets
from tinker_jax.training.pending import complete
from tinker_jax.training.trainer import PerExpertLora, Trainer, groups
from tinker_jax.types import Datum, LoraConfig, ModelInput

LENGTHS = (70, 33, 1, 150)


@pytest.mark.parametrize(
    ("family", "form"),
    [
        *(pytest.param(*each.values, LoraConfig, marks=each.marks) for each in EVERY),
        *(pytest.param(family, PerExpertLora, marks=pytest.mark.slow) for family in ("gpt_oss", "deepseek_v3")),
    ],
)
def test_log_probabilities_and_gradients_of_packed_rows_are_those_of_torch(family, form, record_property):
    model = tiny.model(family)
    cfg, params = tiny.base_params(family, model)
    mesh = sharding.make_mesh()
    plan = memory.plan(cfg, 4, 8 << 30, mesh.shape, "cpu")
    trainer = Trainer(cfg, jax.device_put(params), mesh, plan)
    state, rng = trainer.new_adapter(form(rank=3), 0), np.random.default_rng(1)
    stored = jax.tree.map(lambda x: x + 0.05 * rng.normal(size=x.shape).astype(np.float32), state.stored()[0])
    state = trainer.place(state.lora, stored, None)

    rows = [rng.integers(0, tiny.VOCAB, n + 1) for n in LENGTHS]
    weights = [rng.normal(size=n).astype(np.float32) for n in LENGTHS]
    data = [
        Datum(ModelInput.from_ints(row[:-1].tolist()), {"target_tokens": row[1:], "weights": w})
        for row, w in zip(rows, weights, strict=True)
    ]
    logprobs, metrics = complete(trainer.forward_backward(state, data, "cross_entropy", None, backward=True)).finish()

    factors = torch_factors(stored)
    state_dict, total, gaps = merged(cfg, model, factors, state.scale), torch.zeros(()), []
    for row, w, ours in zip(rows, weights, logprobs, strict=True):
        logits = torch.func.functional_call(model, state_dict, (torch.tensor(row[None, :-1]),), tie_weights=False).logits[0]
        theirs = torch.log_softmax(logits, -1).gather(1, torch.tensor(row[1:, None]))[:, 0]
        gaps.append(np.abs(ours - theirs.detach().numpy()).max())
        total = total - (theirs * torch.tensor(w)).sum()
    assert max(gaps) <= 1e-4
    assert metrics["loss:sum"] == pytest.approx(total.item(), rel=1e-4)
    total.backward()
    ours, errors = lora.trim(state.grads, state.lora.rank), {}
    for (path, got), leaf in zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(factors), strict=True):
        expected = leaf.grad.numpy()
        errors[jax.tree_util.keystr(path)] = np.abs(got - expected).max() / np.abs(expected).max()
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] <= 1e-4, worst

    record_property("family", tiny.family_of(family))
    record_property("log-probabilities in training", float(max(gaps)))
    record_property("gradients", float(errors[worst]))
    for target in lora_targets(cfg):
        if not set(groups(state.lora)).isdisjoint(target.groups) and form is LoraConfig:
            record_property("LoRA target", target.module)
