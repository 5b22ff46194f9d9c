"""The training core against itself under packing, accumulation and sharding."""

import re

import jax
import numpy as np
import pytest
import tiny

from tinker_jax import lora, sharding
from tinker_jax.memory import Plan
from tinker_jax.models.registry import parse
from tinker_jax.models.weights import weights
from tinker_jax.programs import Program
from tinker_jax.training.pending import Retracted, complete
from tinker_jax.training.trainer import Trainer
from tinker_jax.types import AdamParams, Datum, LoraConfig, ModelInput, TensorData
from tinker_jax.types.errors import BadRequestError, UnprocessableEntityError

PLAN = Plan(token_budget=512, remat="none", kv_bytes=1 << 20)
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Waiting(Trainer):
    """Reads every step at once."""

    def forward_backward(self, *args, **kwargs):
        return complete(super().forward_backward(*args, **kwargs)).finish()

    def optim_step(self, *args):
        return super().optim_step(*args).finish()


def trainer(family="qwen3", mesh=None, plan=PLAN, factors=None, deterministic=False):
    """`factors`: what weights are multiplied by, by name."""
    cfg, params = tiny.base_params(family, tiny.model(family))
    params = {name: x * np.float32((factors or {}).get(name, 1)) for name, x in params.items()}
    mesh = sharding.make_mesh(mesh)
    placed = {w.name: jax.device_put(params[w.name], sharding.named(mesh, w.full_axes)) for w in weights(cfg)}
    return Waiting(cfg, placed, mesh, plan, deterministic=deterministic)


def programs(run):
    """Those of the model."""
    return [x for x in vars(run._model).values() if isinstance(x, Program) and x is not run._add]


def perturbed(state, seed=0):
    """Moves `b` off zero, so that gradients of `a` exist and adapters change the outputs."""
    rng = np.random.default_rng(seed)
    params, _ = state.stored()
    moved = lora.pad(jax.tree.map(lambda x: x + 0.05 * rng.normal(size=x.shape).astype(np.float32), params))
    state.params = jax.tree.map(lambda x, old: jax.device_put(x, old.sharding), moved, state.params)
    return state


def datum(rng, n, **inputs):
    tokens = rng.integers(0, tiny.VOCAB, n + 1)
    return Datum(ModelInput.from_ints(tokens[:-1].tolist()), {"target_tokens": tokens[1:].tolist(), **inputs})


def random_data(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [datum(rng, n, weights=rng.normal(size=n).tolist()) for n in lengths]


def leaves(tree):
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def test_a_fresh_adapter_is_bitwise_the_base_model():
    run = trainer()
    data = random_data([40, 90])
    fresh = run.new_adapter(LoraConfig(rank=8), 3)
    other = run.new_adapter(LoraConfig(rank=8, train_mlp=False, train_unembed=False), 4)
    with_all, _ = run.forward_backward(fresh, data, "cross_entropy", None, backward=False)
    with_some, _ = run.forward_backward(other, data, "cross_entropy", None, backward=False)
    none = run.new_adapter(LoraConfig(rank=8), 3)
    none.params = jax.tree.map(jax.numpy.zeros_like, none.params)
    bare, _ = run.forward_backward(none, data, "cross_entropy", None, backward=False)
    for a, b, c in zip(with_all, with_some, bare, strict=True):
        np.testing.assert_array_equal(a, c)
        np.testing.assert_array_equal(b, c)


def test_an_adapter_is_reproducible_from_its_seed():
    run = trainer()
    first, again, other = (run.new_adapter(LoraConfig(rank=8), seed) for seed in (1, 1, 2))
    for a, b, c in zip(*(leaves(s.params).values() for s in (first, again, other)), strict=True):
        np.testing.assert_array_equal(a, b)
        assert not np.any(a) or np.any(a != c)


@pytest.mark.parametrize("flags", [("train_attn",), ("train_mlp",), ("train_unembed",), ("train_attn", "train_unembed")])
def test_only_the_chosen_groups_are_trained(flags):
    run = trainer()
    config = LoraConfig(rank=2, **{f: f in flags for f in ("train_attn", "train_mlp", "train_unembed")})
    state = run.new_adapter(config, 0)
    run.forward_backward(state, random_data([20]), "cross_entropy", None, backward=True)
    run.optim_step(state, AdamParams(learning_rate=0.1))
    modules = set(state.params.get("layers", {})) | ({"lm_head"} if "lm_head" in state.params else set())
    members = {"train_attn": PROJECTIONS[:4], "train_mlp": PROJECTIONS[4:], "train_unembed": ["lm_head"]}
    assert modules == {m for f in flags for m in members[f]}
    assert all(np.any(x) for x in leaves(state.params).values())


def test_results_do_not_depend_on_what_shares_the_batch():
    lengths = [5, 200, 64, 31, 90, 1, 130]
    data = random_data(lengths)
    alone_run, together_run = trainer(), trainer(plan=Plan(token_budget=4096, remat="full", kv_bytes=1))
    alone, together = (perturbed(r.new_adapter(LoraConfig(rank=4), 0)) for r in (alone_run, together_run))
    singles = [alone_run.forward_backward(alone, [d], "cross_entropy", None, backward=True)[0][0] for d in data]
    packed, _ = together_run.forward_backward(together, data, "cross_entropy", None, backward=True)
    for a, b in zip(singles, packed, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    theirs = leaves(alone.grads)
    for name, ours in leaves(together.grads).items():
        assert np.abs(ours - theirs[name]).max() <= 1e-5 * max(1.0, np.abs(theirs[name]).max()), name


def test_identical_datums_in_one_batch_get_identical_logprobs():
    run = trainer()
    state = perturbed(run.new_adapter(LoraConfig(rank=4), 0))
    copies = random_data([77]) * 9
    logprobs, _ = run.forward_backward(state, copies, "cross_entropy", None, backward=False)
    for copy in logprobs[1:]:
        np.testing.assert_allclose(copy, logprobs[0], atol=1e-5)


def test_top_k_targets_equal_separate_single_targets():
    rng = np.random.default_rng(0)
    run = trainer()
    state = perturbed(run.new_adapter(LoraConfig(rank=4), 0))
    tokens, targets = rng.integers(0, tiny.VOCAB, 30).tolist(), rng.integers(0, tiny.VOCAB, (30, 3))
    w = rng.normal(size=(30, 3)).astype(np.float32)
    wide = Datum(ModelInput.from_ints(tokens), {"target_tokens": targets, "weights": w})
    (lp,), metrics = run.forward_backward(state, [wide], "cross_entropy", None, backward=True)
    wide_grads, state.grads, total = state.grads, None, 0.0
    for k in range(3):
        single = Datum(ModelInput.from_ints(tokens), {"target_tokens": targets[:, k], "weights": w[:, k]})
        (lp_k,), m = run.forward_backward(state, [single], "cross_entropy", None, backward=True)
        np.testing.assert_allclose(lp[:, k], lp_k, atol=1e-6)
        total += m["loss:sum"]
    assert metrics["loss:sum"] == pytest.approx(total, rel=1e-5)
    for a, b in zip(jax.tree.leaves(wide_grads), jax.tree.leaves(state.grads), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4)


def test_targets_of_different_width_share_a_batch():
    rng = np.random.default_rng(0)
    run = trainer()
    state = run.new_adapter(LoraConfig(rank=4), 0)
    shapes = [(3, 2), (3, 5), (3,), (3,)]  # none with weights: each of its targets weighs 1, and no padding column does
    data = [Datum(ModelInput.from_ints([1, 2, 3]), {"target_tokens": rng.integers(0, 9, shape)}) for shape in shapes]
    flat = TensorData(data=[4, 5, 6], dtype="int64")  # made without a shape
    data[-1] = Datum(ModelInput.from_ints([1, 2, 3]), {"target_tokens": flat})
    logprobs, metrics = run.forward_backward(state, data, "cross_entropy", None, backward=False)
    assert [lp.shape for lp in logprobs] == shapes
    alone = [run.forward_backward(state, [d], "cross_entropy", None, backward=False) for d in data]
    for lp, ((expected,), _) in zip(logprobs, alone, strict=True):
        np.testing.assert_allclose(lp, expected, atol=1e-6)
    assert metrics["loss:sum"] == pytest.approx(sum(m["loss:sum"] for _, m in alone), rel=1e-5)


def test_gradients_accumulate_until_the_step_and_are_zero_after():
    run = trainer()
    data = random_data([20, 50])
    one, two = (perturbed(run.new_adapter(LoraConfig(rank=4), 0)) for _ in range(2))
    run.forward_backward(one, data, "cross_entropy", None, backward=True)
    for d in data:
        run.forward_backward(two, [d], "cross_entropy", None, backward=True)
    for a, b in zip(jax.tree.leaves(one.grads), jax.tree.leaves(two.grads), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4)
    norm = run.optim_step(two, AdamParams())["grad_norm"]
    assert norm == pytest.approx(np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(one.grads))), rel=1e-4)
    with pytest.raises(BadRequestError, match="optim_step without gradients: call forward_backward first"):
        run.optim_step(two, AdamParams())


def test_a_second_micro_batch_that_fails_leaves_no_half_of_the_call(monkeypatch):
    run = trainer(plan=Plan(token_budget=64, remat="none", kv_bytes=1))
    state = perturbed(run.new_adapter(LoraConfig(rank=4), 0))
    run.forward_backward(state, random_data([60]), "cross_entropy", None, backward=True)
    before = leaves(state.grads)
    micro_batch, calls = run._model._micro_batch, []

    def fails_later(*args):
        calls.append(1)
        return micro_batch(*args) if len(calls) == 1 else 1 / 0

    with monkeypatch.context() as patch:
        patch.setattr(run._model, "_micro_batch", fails_later)
        with pytest.raises(ZeroDivisionError):
            run.forward_backward(state, random_data([400, 400], seed=1), "cross_entropy", None, backward=True)
    after = leaves(state.grads)
    assert len(calls) == 2 and all(np.array_equal(before[name], after[name]) for name in before)


def test_a_step_with_infinite_gradients_is_refused_and_changes_nothing():
    run = trainer()
    state = perturbed(run.new_adapter(LoraConfig(rank=4), 0))
    run.forward_backward(state, random_data([20]), "cross_entropy", None, backward=True)
    state.grads = jax.tree.map(lambda x: x * np.inf, state.grads)
    before = leaves((state.params, state.opt))
    with pytest.raises(UnprocessableEntityError, match="not finite"):
        run.optim_step(state, AdamParams())
    after = leaves((state.params, state.opt))
    assert all(np.array_equal(before[k], after[k]) for k in before)
    run.forward_backward(state, random_data([20]), "cross_entropy", None, backward=True)
    run.optim_step(state, AdamParams())


def test_a_step_that_would_leave_the_adapter_not_finite_is_refused_and_changes_nothing():
    run = trainer()
    state = perturbed(run.new_adapter(LoraConfig(rank=4), 0))
    run.forward_backward(state, random_data([20]), "cross_entropy", None, backward=True)
    before = leaves((state.params, state.opt))
    with pytest.raises(
        UnprocessableEntityError, match=r"the adapter or its moments would not be finite .* Lower learning_rate"
    ):
        run.optim_step(state, AdamParams(learning_rate=1e38, weight_decay=1e3))
    after = leaves((state.params, state.opt))
    assert all(np.array_equal(before[k], after[k]) for k in before)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        ("adapter", r"log-probabilities of data\[0\] are not finite: the adapter's layers\.\w+_proj\.[ab] has such values"),
        ("base", r"log-probabilities of data\[0\] are not finite, though the adapter is: the base weights have such values"),
        ("data", "the loss is not finite, though the log-probabilities are: weights"),
    ],
)
def test_a_loss_that_is_not_finite_is_refused_with_its_reason(broken, reason, backward):
    run = trainer()
    state, weight = perturbed(run.new_adapter(LoraConfig(rank=4), 0)), 1.0
    if broken == "adapter":
        state.params["layers"]["q_proj"]["b"] = state.params["layers"]["q_proj"]["b"].at[0].set(np.nan)
    elif broken == "base":
        run = trainer(factors={"final_norm.scale": np.nan})
    else:
        weight = 3e38
    data = [datum(np.random.default_rng(i), 20, weights=[weight] * 20) for i in range(2)]
    with pytest.raises(Retracted) as refused:
        run.forward_backward(state, data, "cross_entropy", None, backward=backward)
    assert isinstance(refused.value.error, UnprocessableEntityError)
    assert refused.match(f"^forward{'_backward' * backward}: .*{reason}.*nothing was changed")


@pytest.mark.parametrize("mesh", [{"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 4, "tensor": 2}, {"tensor": 4}])
@pytest.mark.parametrize("loss_fn", ["cross_entropy", "ppo"])
def test_a_mesh_gives_the_losses_and_gradients_of_one_device(mesh, loss_fn):
    rng = np.random.default_rng(0)
    if loss_fn == "cross_entropy":
        data = random_data([30, 64, 7, 100, 20])
    else:
        lengths = [30, 64, 7, 100, 20]
        data = [
            datum(rng, n, logprobs=(-5 + rng.normal(size=n)).tolist(), advantages=rng.normal(size=n).tolist()) for n in lengths
        ]
    single, many = trainer(), trainer(mesh=mesh)
    a, b = (perturbed(r.new_adapter(LoraConfig(rank=4), 0)) for r in (single, many))
    lp_a, metrics_a = single.forward_backward(a, data, loss_fn, None, backward=True)
    lp_b, metrics_b = many.forward_backward(b, data, loss_fn, None, backward=True)
    for x, y in zip(lp_a, lp_b, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)
    assert metrics_a == pytest.approx(metrics_b, rel=1e-4, abs=1e-5)
    theirs = leaves(a.grads)
    for name, ours in leaves(b.grads).items():
        assert np.abs(ours - theirs[name]).max() <= 1e-5 * max(1.0, np.abs(theirs[name]).max()), name
    single.optim_step(a, AdamParams(learning_rate=1e-3, grad_clip_norm=1.0))
    many.optim_step(b, AdamParams(learning_rate=1e-3, grad_clip_norm=1.0))


def test_parameters_are_really_sharded():
    run = trainer(mesh={"data": 2, "fsdp": 2, "tensor": 2})
    kernel = run._model._params["layers.q_proj.kernel"]
    L, out, D = kernel.shape
    assert kernel.addressable_shards[0].data.shape == (L, out // 2, D // 2)
    state = run.new_adapter(LoraConfig(rank=4), 0)
    run.forward_backward(state, random_data([30]), "cross_entropy", None, backward=True)
    run.optim_step(state, AdamParams())
    for tree in (state.params, state.opt["mu"], state.opt["nu"]):
        down = tree["layers"]["down_proj"]
        assert down["a"].addressable_shards[0].data.shape == (L, 24, 8)
        assert down["b"].addressable_shards[0].data.shape == (L, 8, D // 2)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("mesh", [None, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_a_step_on_the_results_of_a_step_compiles_nothing(mesh, deterministic):
    run = trainer(mesh=mesh, deterministic=deterministic)
    state = run.new_adapter(LoraConfig(rank=4), 0)
    compiled = []
    for _ in range(3):
        for _ in range(2):
            run.forward_backward(state, random_data([30]), "cross_entropy", None, backward=True)
        run.optim_step(state, AdamParams())
        compiled.append([program._jit._cache_size() for program in (*programs(run), run._add, run._update)])
    assert compiled[0] == compiled[1] == compiled[2] and set(compiled[0][:-1]) == ({1} if deterministic else {0, 1})


def test_a_mesh_that_does_not_divide_a_weight_is_refused_by_name():
    mesh = sharding.make_mesh({"tensor": 8})
    with pytest.raises(BadRequestError, match=r"model.k_proj: dimension 1 \(kv_heads\) has size 20.*'tensor' of size 8"):
        sharding.check_divisible("model.k_proj", (32, 20), ("embed", "kv_heads"), mesh)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_a_mesh_that_does_not_divide_the_experts_is_refused_by_name(family):
    mesh = sharding.make_mesh({"expert": 4})
    experts = next(w for w in weights(parse(tiny.CONFIGS[family]().to_dict())) if w.experts)
    name = re.escape(experts.hf)
    with pytest.raises(BadRequestError, match=rf"{name}: dimension 1 \(.*\) has size 6, which mesh axis 'expert' of size 4"):
        sharding.check_divisible(experts.hf, experts.full_shape, experts.full_axes, mesh)


def test_targets_of_any_width_compile_few_programs():
    run = trainer()
    state = run.new_adapter(LoraConfig(rank=2, train_mlp=False, train_unembed=False), 0)
    rng = np.random.default_rng(0)
    for width in range(1, 17):
        wide = Datum(ModelInput.from_ints([1, 2, 3]), {"target_tokens": rng.integers(0, 9, (3, width))})
        ((lp,), _) = run.forward_backward(state, [wide], "cross_entropy", None, backward=False)
        assert lp.shape == (3, width)
    assert [program.count for program in programs(run)] == [program._jit._cache_size() for program in programs(run)]
    assert run._model._loss.count <= 5 and run.programs <= 7


def test_adapters_of_equal_rank_on_other_modules_count_as_programs_of_their_own():
    run = trainer()
    for flags in ({"train_mlp": False}, {"train_attn": False}):
        state = run.new_adapter(LoraConfig(rank=2, train_unembed=False, **flags), 0)
        run.forward_backward(state, random_data([20]), "cross_entropy", None, backward=False)
    assert [program.count for program in programs(run)] == [program._jit._cache_size() for program in programs(run)]
    assert (run._model._forward.count, run.programs) == (2, 4)


def test_random_lengths_compile_few_programs():
    run = trainer(plan=Plan(token_budget=512, remat="none", kv_bytes=1))
    state = run.new_adapter(LoraConfig(rank=2, train_mlp=False, train_unembed=False), 0)
    rng = np.random.default_rng(0)
    for _ in range(25):
        lengths = rng.integers(1, 128, rng.integers(1, 12))
        run.forward_backward(state, random_data(lengths), "cross_entropy", None, backward=True)
    assert run.programs <= 3 * 4  # rows of 128, 256, 512: embedding, a layer's two passes, loss


def test_ranks_of_a_bucket_share_their_programs_and_give_the_results_of_their_own_rank(monkeypatch):
    def train(run, rank):
        state = perturbed(run.new_adapter(LoraConfig(rank=rank), 0))
        values = []
        for seed in range(2):
            values += run.forward_backward(state, random_data([30, 12], seed), "cross_entropy", None, backward=True)[0]
            values.append(run.optim_step(state, AdamParams(learning_rate=1e-2, weight_decay=0.1))["grad_norm"])
        return state, values

    run = trainer()
    padded, updates = {}, set()
    for rank in (5, 6, 8):
        padded[rank] = train(run, rank)
        updates.add(run._update._jit._cache_size())
    assert sorted(program._jit._cache_size() for program in programs(run)) == [0, 1, 1, 1, 1] and run.programs == 4
    assert run._update.count == len(updates) == 1  # its cache is shared by all trainers
    for rank, (state, values) in padded.items():
        with monkeypatch.context() as patch:
            patch.setattr(lora, "bucket", lambda rank: rank)
            plain, expected = train(trainer(), rank)
        for ours, theirs in zip(values, expected, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
        theirs = leaves(plain.stored())
        for name, ours in leaves(state.stored()).items():
            assert ours.shape == theirs[name].shape
            assert np.abs(ours - theirs[name]).max() <= 1e-5 * max(1.0, np.abs(theirs[name]).max()), name
        again = [lora.pad(tree) for tree in state.stored()]
        for ours, whole in zip(jax.tree.leaves(again), jax.tree.leaves([state.params, state.opt]), strict=True):
            np.testing.assert_array_equal(ours, whole)  # what was added is still zero
