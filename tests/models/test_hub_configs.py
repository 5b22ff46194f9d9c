"""The configurations of the hub's models: they are read, and describe models of the size in their names."""

import math

import pytest
import tiny
from hub_configs import HUB

from tinker_jax.models.registry import FAMILIES, parse
from tinker_jax.models.weights import weights
from tinker_jax.types.errors import BadRequestError


@pytest.mark.parametrize("name", HUB)
def test_a_model_of_the_hub_has_the_number_of_parameters_in_its_name(name, record_property):
    config, parameters = HUB[name]
    assert sum(math.prod(w.full_shape) for w in weights(parse(config))) == pytest.approx(parameters, rel=0.01)
    record_property("family", config["model_type"])
    record_property("hub", name)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_old_and_new_keys_of_the_rope_are_read_alike(family):
    new = tiny.CONFIGS[family]().to_dict()
    rope = {key: value for key, value in new["rope_parameters"].items() if key != "rope_theta"}
    old = {key: value for key, value in new.items() if key != "rope_parameters"}
    assert parse(old | {"rope_theta": new["rope_parameters"]["rope_theta"], "rope_scaling": rope}) == parse(new)


@pytest.mark.parametrize(
    ("family", "keys"),
    [
        ("qwen3_moe", ("num_experts", "num_local_experts")),
        ("gpt_oss", ("num_experts", "num_local_experts")),
        ("deepseek_v3", ("n_routed_experts", "num_local_experts")),
    ],
)
def test_every_name_of_the_number_of_experts_is_read_alike(family, keys):
    config = tiny.CONFIGS[family]().to_dict()
    bare = {key: value for key, value in config.items() if key not in keys}
    first, second = (parse(bare | {key: 8}) for key in keys)
    assert first == second and first.E == 8


def test_every_family_is_refused_without_the_keys_it_needs():
    for family in FAMILIES:
        with pytest.raises(BadRequestError, match=f"is missing; a {family} model needs it"):
            parse({"model_type": family})
