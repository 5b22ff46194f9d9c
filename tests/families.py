"""The adapters of any family in torch: every target's update merged into the weight, as a function of its factors."""

from __future__ import annotations

import jax
import numpy as np
import torch

from tinker_jax.models.weights import lora_targets


def torch_factors(adapter):
    """The adapter's arrays as torch leaves that want gradients."""
    return jax.tree.map(lambda x: torch.tensor(np.array(x), requires_grad=True), adapter)


def merged(cfg, model, factors, scale):
    """The parameters of a transformers model with the updates added: {name: tensor}, for `torch.func.functional_call`."""
    state = {name: p.detach() for name, p in model.named_parameters()}
    for target in lora_targets(cfg):
        node = factors.get(target.stack, {}) if target.stack else factors
        if target.module not in node:
            continue
        a, b = node[target.module]["a"], node[target.module]["b"]
        if target.module == "lm_head":
            state["lm_head.weight"] = (
                state["lm_head.weight" if not cfg.tied else "model.embed_tokens.weight"] + scale * (a @ b).T
            )
            continue
        for number, w in enumerate(target.weights):
            for at, layer in enumerate(w.layers):
                if w.shares is None:
                    name = w.hf.format(layer=layer)
                    state[name] = state[name] + scale * (a[at] @ b[at]).T
                    continue
                own_a, own_b = (x[at, number] if x.ndim == 5 else x[at] for x in (a, b))
                own = scale * own_a @ own_b  # [E, in, out]
                fused, name = w.fused, w.fused.hf.format(layer=layer)
                whole = torch.zeros(fused.shape)
                index = [slice(None)] * 3
                index[1 + fused.axis] = slice(fused.first, fused.first + fused.step * w.shape[1], fused.step)
                whole[tuple(index)] = own if fused.transposed else own.transpose(1, 2)
                state[name] = state[name] + whole
    return state
