"""Routers choose and weigh as transformers' do, gradients included; expert load is reported as Tinker defines it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from tinker.lib.chunked_fwdbwd_helpers import REDUCE_MAP
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from tinker_jax.models.routers import grouped_sigmoid_top_k, load_metrics, softmax_top_k, top_k_softmax

M, D, E, K = 200, 16, 32, 6


def qwen3_moe(renormalise):
    config = transformers.Qwen3MoeConfig(hidden_size=D, num_experts=E, num_experts_per_tok=K, norm_topk_prob=renormalise)
    return Qwen3MoeTopKRouter(config), lambda router: lambda x: softmax_top_k(x, K, renormalise=renormalise)


def gpt_oss():
    config = transformers.GptOssConfig(hidden_size=D, num_local_experts=E, num_experts_per_tok=K)
    return GptOssTopKRouter(config), lambda router: lambda x: top_k_softmax(x, K)


def deepseek_v3(groups, top_groups, renormalise=True):
    config = transformers.DeepseekV3Config(
        hidden_size=D,
        n_routed_experts=E,
        num_experts_per_tok=K,
        n_group=groups,
        topk_group=top_groups,
        norm_topk_prob=renormalise,
        routed_scaling_factor=2.5,
    )
    options = {"groups": groups, "top_groups": top_groups, "renormalise": renormalise, "factor": 2.5}

    def ours(router):
        bias = jnp.asarray(router.e_score_correction_bias.numpy())
        return lambda x: grouped_sigmoid_top_k(x, bias, K, **options)

    return DeepseekV3TopkRouter(config), ours


ROUTERS = {
    "qwen3_moe": qwen3_moe(True),
    "qwen3_moe, not renormalised": qwen3_moe(False),
    "gpt_oss": gpt_oss(),
    "deepseek_v3": deepseek_v3(8, 3),
    "deepseek_v3, not renormalised": deepseek_v3(8, 3, renormalise=False),
    "deepseek_v3, groups that just suffice": deepseek_v3(16, 3),
    "kimi_k2": deepseek_v3(1, 1),
}


@pytest.mark.parametrize("name", ROUTERS)
def test_choices_weights_and_gradients_are_those_of_transformers(name):
    router, ours = ROUTERS[name]
    torch.manual_seed(0)
    for tensor in router.state_dict().values():
        tensor.normal_()  # a bias of the choice as large as the scores, so that it decides
    hidden = torch.randn(M, D, requires_grad=True)
    logits, expected, chosen = router(hidden)
    logits.retain_grad()
    # The order of a token's experts is open where transformers asks for unsorted choices.
    chosen, order = chosen.sort(dim=1)
    expected = expected.gather(1, order)
    upstream = torch.randn(M, E)
    expected.backward(upstream.gather(1, chosen))

    def by_expert(logits_ME):
        weights_MK, experts_MK = jax.jit(ours(router))(logits_ME)
        order = jnp.argsort(experts_MK, axis=1)
        return jnp.take_along_axis(weights_MK, order, axis=1), jnp.take_along_axis(experts_MK, order, axis=1)

    weights_MK, pull, experts_MK = jax.vjp(by_expert, jnp.asarray(logits.detach().numpy()), has_aux=True)
    assert weights_MK.dtype == jnp.float32 and experts_MK.dtype == jnp.int32
    np.testing.assert_array_equal(experts_MK, chosen)
    np.testing.assert_allclose(weights_MK, expected.detach(), rtol=1e-5)
    (gradient,) = pull(jnp.asarray(upstream.gather(1, chosen).numpy()))
    np.testing.assert_allclose(gradient, logits.grad, rtol=1e-4, atol=1e-6)


ALL = {
    "softmax_top_k": lambda x: softmax_top_k(x, K, renormalise=True),
    "top_k_softmax": lambda x: top_k_softmax(x, K),
    "grouped_sigmoid_top_k": lambda x: grouped_sigmoid_top_k(
        x, jnp.zeros(E), K, groups=8, top_groups=4, renormalise=True, factor=1.0
    ),
}


@pytest.mark.parametrize("name", ALL)
def test_among_equal_scores_the_lowest_expert_is_chosen_first(name):
    weights_MK, experts_MK = ALL[name](jnp.zeros((3, E)))
    np.testing.assert_array_equal(experts_MK, np.tile(np.arange(K), (3, 1)))
    np.testing.assert_allclose(weights_MK, 1 / K, rtol=1e-6)

    logits = np.ones(E, np.float32)
    logits[[5, 7, 13, 30]], logits[31] = 2, 3
    _, experts_MK = ALL[name](jnp.asarray(logits)[None])
    np.testing.assert_array_equal(experts_MK, [[31, 5, 7, 13, 30, 0]])


def test_the_bias_steers_the_choice_and_gets_no_gradient():
    def total(bias):
        weights, experts = grouped_sigmoid_top_k(
            jnp.zeros((1, E)), bias, 2, groups=1, top_groups=1, renormalise=False, factor=3.0
        )
        return weights.sum(), experts

    (value, experts), gradient = jax.value_and_grad(total, has_aux=True)(jnp.zeros(E).at[jnp.array([9, 20])].set(5.0))
    assert experts.tolist() == [[9, 20]] and value == 3.0
    np.testing.assert_array_equal(gradient, 0)


def test_scores_that_vanish_give_weights_of_zero():
    weights_MK, _ = ALL["grouped_sigmoid_top_k"](jnp.full((1, E), -200.0))
    np.testing.assert_array_equal(weights_MK, 0)


def test_load_is_measured_against_the_perfect_balance_of_each_layer():
    assert load_metrics(np.array([[4, 0, 2, 2], [1, 1, 3, 3]])) == {
        "e_frac_with_tokens:mean": (3 / 4 + 1) / 2,
        "e_frac_oversubscribed:mean": (1 / 4 + 2 / 4) / 2,
        "e_max_violation:mean": (1 + 0.5) / 2,
        "e_max_violation:max": 1,
        "e_min_violation:mean": (-1 - 0.5) / 2,
    }


def test_a_layer_without_tokens_is_balanced():
    balanced = {"e_frac_with_tokens:mean": 1, "e_frac_oversubscribed:mean": 0}
    balanced |= {"e_max_violation:mean": 0, "e_max_violation:max": 0, "e_min_violation:mean": 0}
    assert load_metrics(np.zeros((2, 4), np.int32)) == load_metrics(np.full((1, 4), 7)) == balanced


def test_load_metrics_are_floats_under_names_that_the_sdk_can_combine():
    for name, value in load_metrics(np.array([[3, 0]])).items():
        assert type(value) is float and name.split(":")[1] in REDUCE_MAP
