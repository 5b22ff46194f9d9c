"""What an editor shows for a call says what the losses take and what comes back."""

from __future__ import annotations

import dataclasses
import inspect
import re

import pytest

from tinker_jax import AdamParams, SamplingClient, TrainingClient, types
from tinker_jax.types.loss_specs import LOSS_SPECS

LOSSES = [TrainingClient.forward, TrainingClient.forward_backward]


def rows(doc: str, begin: str, end: str) -> dict[str, str]:
    """Lines `name: …` of the losses between two lines."""
    part = doc.split(begin)[1].split(end)[0]
    return {m[1]: m[2] for m in re.finditer(r"^ +(\w+): (.*)$", part, re.MULTILINE) if m[1] in LOSS_SPECS}


@pytest.mark.parametrize("method", LOSSES)
def test_the_inputs_of_every_loss_are_listed(method):
    listed = rows(inspect.getdoc(method), "data:", "loss_fn:")
    assert set(listed) == set(LOSS_SPECS)
    for name, spec in LOSS_SPECS.items():
        wanted = [key if declared.required else f"[{key}]" for key, declared in spec.inputs.items()]
        assert listed[name].split(", ") == wanted, name


@pytest.mark.parametrize("method", LOSSES)
def test_the_configuration_of_every_loss_is_listed_with_its_defaults(method):
    listed = rows(inspect.getdoc(method), "loss_fn_config:", "Returns:")
    assert set(listed) == {name for name, spec in LOSS_SPECS.items() if spec.config}
    for name, text in listed.items():
        defaults = dict(item.rsplit(" ", 1) for item in text.split(", "))
        assert {key: float(value) for key, value in defaults.items()} == dict(LOSS_SPECS[name].config), name


@pytest.mark.parametrize(
    ("method", "results"),
    [
        (TrainingClient.forward, [types.ForwardBackwardOutput]),
        (TrainingClient.forward_backward, [types.ForwardBackwardOutput]),
        (TrainingClient.optim_step, [types.OptimStepResponse]),
        (SamplingClient.sample, [types.SampleResponse, types.SampledSequence, types.PromptAltTokens]),
    ],
)
def test_every_field_of_the_result_is_described(method, results):
    described = inspect.getdoc(method).split("Returns:")[1].split("Raises:")[0]
    for result in results:
        fields = {field.name for field in dataclasses.fields(result) if not field.name.startswith("_")}
        properties = {name for name in vars(result) if not name.startswith("_")}
        for name in fields | properties:
            assert re.search(rf"\b{name}\b", described), name


def test_the_hyperparameters_are_named():
    for method, cls in [(TrainingClient.optim_step, AdamParams), (SamplingClient.sample, types.SamplingParams)]:
        assert f"`{cls.__name__}({', '.join(f.name for f in dataclasses.fields(cls))})`" in " ".join(
            inspect.getdoc(method).split()
        )
