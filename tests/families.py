"""What the tests of every family share: which configurations run, and adapters in torch.

Figures for docs/models.md are recorded with `record_property`: "family", and what `scripts/models_table.py` reads.
"""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
import torch
import transformers

from tinker_jax.models.weights import lora_targets

# Three configurations of each family; one runs by default, and Kimi-K2 is DeepSeek-V3 to our code.
EVERY = [
    pytest.param(name, marks=[] if name in tiny.FAMILIES and name != "kimi_k2" else pytest.mark.slow) for name in tiny.CONFIGS
]


def pretrained(directory: Path, dtype=torch.float32):
    """A checkpoint as transformers loads it, by the class that it names: of `kimi_k2` transformers knows the class alone."""
    config = json.loads((directory / "config.json").read_text())
    (name,) = config["architectures"]
    model = getattr(transformers, name)
    config = model.config_class.from_dict(config | {"model_type": model.config_class.model_type})
    return model.from_pretrained(directory, config=config, dtype=dtype, experts_implementation="eager")


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
