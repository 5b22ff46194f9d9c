"""What there is to compile does not grow with the depth of the model."""

import dataclasses
from typing import get_args

import jax
import numpy as np
import pytest
import tiny
from jaxprs import equations

from tinker_jax import sharding
from tinker_jax.memory import Plan
from tinker_jax.models.decoder import Remat
from tinker_jax.models.registry import parse
from tinker_jax.models.weights import weights
from tinker_jax.programs import Program
from tinker_jax.training.pending import complete
from tinker_jax.training.trainer import Trainer
from tinker_jax.types import Datum, LoraConfig, ModelInput

CONFIG = parse(tiny.CONFIGS["qwen3"]().to_dict())
DATA = [Datum(ModelInput.from_ints([1, 2, 3]), {"target_tokens": [2, 3, 4]})]


class Traced(Exception):
    """Carries the program that was about to run."""


@pytest.fixture
def training_step(monkeypatch):
    """`training_step(depth, remat)` → what jax.jit would compile for a forward_backward."""

    def trace(program, *args, shape, **static):
        raise Traced(program._jit.trace(*args, **static))

    def step(depth, remat):
        cfg = dataclasses.replace(CONFIG, L=depth)
        mesh = sharding.make_mesh({"data": 2})  # one CPU would go layer by layer
        params = {w.name: jax.device_put(np.zeros(w.full_shape, np.float32), sharding.replicated(mesh)) for w in weights(cfg)}
        trainer = Trainer(cfg, params, mesh, Plan(token_budget=512, remat=remat, kv_bytes=1))
        adapter = trainer.new_adapter(LoraConfig(rank=4), 0)
        with pytest.raises(Traced) as caught:
            complete(trainer.forward_backward(adapter, DATA, "cross_entropy", None, backward=True))
        return caught.value.args[0]

    monkeypatch.setattr(Program, "__call__", trace)
    return step


@pytest.mark.parametrize("remat", get_args(Remat))
def test_a_deeper_model_is_the_same_program_over_longer_arrays(training_step, remat):
    shallow, deep = (training_step(depth, remat) for depth in (2, 8))
    assert sum(1 for _ in equations(shallow.jaxpr)) == sum(1 for _ in equations(deep.jaxpr)) > 100
    instructions = [traced.lower().as_text().count("\n") for traced in (shallow, deep)]
    assert instructions[0] == instructions[1] > 500
