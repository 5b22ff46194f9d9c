"""Adapter and optimiser state: what comes back is what was saved, bit for bit, where it was asked for."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_cases import META, RUN, adapter, optimizer, run_record
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tinker_jax.checkpoints import state
from tinker_jax.checkpoints.store import Store
from tinker_jax.types.errors import BadRequestError, StorageError, UnprocessableEntityError


def abstract(tree, sharding=None):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def assert_identical(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a).view(np.int32), np.asarray(b).view(np.int32))


def test_adapter_and_optimizer_come_back_bit_for_bit(tmp_path):
    odd = jnp.asarray([-0.0, 1e-42, -1e-42, 3.4e38, -3.4e38, 1.1], jnp.float32)  # 1e-42 is denormal
    weights, moments = adapter(0), optimizer(0)
    weights["lm_head"]["a"] = weights["lm_head"]["a"].at[:6, 0].set(odd)
    state.save_adapter(tmp_path, weights, moments, META)
    got, got_moments = state.load_adapter(tmp_path, abstract(weights), abstract(moments))
    assert_identical(got, weights)
    assert_identical(got_moments, moments)


def test_weights_alone_can_be_loaded_from_a_full_checkpoint(tmp_path):
    state.save_adapter(tmp_path, adapter(0), optimizer(0), META)
    got, none = state.load_adapter(tmp_path, abstract(adapter(0)))
    assert_identical(got, adapter(0))
    assert none is None


def test_arrays_land_in_the_sharding_asked_for_whatever_they_were_saved_from(tmp_path):
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"))
    weights = adapter(0)
    saved = jax.device_put(weights, NamedSharding(mesh, P()))
    saved["lm_head"]["b"] = jax.device_put(weights["lm_head"]["b"], NamedSharding(mesh, P(None, "tensor")))
    state.save_adapter(tmp_path, saved, None, META)
    wanted = abstract(weights, NamedSharding(mesh, P()))
    across = NamedSharding(mesh, P(None, "fsdp"))
    wanted["lm_head"]["b"] = jax.ShapeDtypeStruct((4, 64), jnp.float32, sharding=across)
    got, _ = state.load_adapter(tmp_path, wanted)
    assert got["lm_head"]["b"].sharding == across
    assert {s.data.shape for s in got["lm_head"]["b"].addressable_shards} == {(4, 16)}
    assert got["lm_head"]["a"].sharding == NamedSharding(mesh, P())
    assert_identical(got, weights)


def test_the_description_reads_as_plain_json(tmp_path):
    state.save_adapter(tmp_path, adapter(0), None, META)
    described = json.loads((tmp_path / "meta.json").read_text())
    assert described == state.read_meta(tmp_path)
    assert described["meta"] == META and described["lora_alpha"] == 32.0
    assert described["tensors"]["adapter"]["layers.q_proj.a"] == {"shape": [3, 16, 4], "dtype": "float32"}
    assert "optimizer" not in described["tensors"]


def test_read_adapter_gives_host_arrays_by_dotted_name(tmp_path):
    state.save_adapter(tmp_path, adapter(0), optimizer(0), META)
    got = state.read_adapter(tmp_path)
    assert sorted(got) == ["layers.q_proj.a", "layers.q_proj.b", "lm_head.a", "lm_head.b"]
    assert all(type(array) is np.ndarray for array in got.values())
    np.testing.assert_array_equal(got["layers.q_proj.a"], adapter(0)["layers"]["q_proj"]["a"])


def test_missing_optimizer_state_is_named(tmp_path):
    state.save_adapter(tmp_path, adapter(0), None, META)
    with pytest.raises(BadRequestError, match=r"was saved without optimizer state .* load the weights only"):
        state.load_adapter(tmp_path, abstract(adapter(0)), abstract(optimizer(0)))


def test_another_rank_names_the_tensor_and_both_shapes(tmp_path):
    state.save_adapter(tmp_path, adapter(0), optimizer(0), META)
    with pytest.raises(UnprocessableEntityError) as error:
        state.load_adapter(tmp_path, abstract(adapter(0, rank=8)))
    assert "adapter tensor 'layers.q_proj.a': expected shape [3, 16, 8], the checkpoint has [3, 16, 4]" in str(error.value)
    with pytest.raises(UnprocessableEntityError, match=r"optimizer tensor 'mu\.layers\.q_proj\.a': expected shape"):
        state.load_adapter(tmp_path, abstract(adapter(0)), abstract(optimizer(0, rank=8)))


def test_other_trained_groups_are_refused_both_ways(tmp_path):
    state.save_adapter(tmp_path, adapter(0), None, META)
    less = {"layers": adapter(0)["layers"]}
    with pytest.raises(UnprocessableEntityError, match=r"'lm_head\.a' of the checkpoint has no place here \(2 are surplus\)"):
        state.load_adapter(tmp_path, abstract(less))
    more = adapter(0) | {"extra": {"a": jnp.zeros((1,))}}
    with pytest.raises(UnprocessableEntityError, match=r"'extra\.a' is expected, .* has none \(1 are missing\)"):
        state.load_adapter(tmp_path, abstract(more))


def test_missing_and_damaged_files_are_storage_errors(tmp_path):
    with pytest.raises(StorageError, match=r"cannot read .*meta\.json: No such file .* Was the checkpoint removed\?"):
        state.read_meta(tmp_path)
    state.save_adapter(tmp_path, adapter(0), None, META)
    for data in (tmp_path / "adapter").rglob("d/*"):
        data.write_bytes(data.read_bytes()[:10])
    with pytest.raises(StorageError, match=r"is damaged: its SHA-256 is not the one in SHA256SUMS"):
        state.load_adapter(tmp_path, abstract(adapter(0)))
    (tmp_path / "meta.json").write_text("{")
    with pytest.raises(StorageError, match=r"meta\.json is damaged"):
        state.read_meta(tmp_path)
    (tmp_path / "meta.json").write_text('{"format": 2}')
    with pytest.raises(StorageError, match=r"has format 2; this version reads format 1"):
        state.read_meta(tmp_path)


def test_saving_and_loading_is_silent(tmp_path, caplog):
    with caplog.at_level(logging.INFO), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        state.save_adapter(tmp_path, adapter(0), optimizer(0), META)
        state.load_adapter(tmp_path, abstract(adapter(0)), abstract(optimizer(0)))
    assert [r for r in caplog.records if r.name == "absl"] == []


INTERRUPTED = """
    import os, resource, signal, sys
    import jax, orbax.checkpoint as ocp
    from checkpoint_cases import META, adapter, optimizer
    from tinker_jax.checkpoints import state
    from tinker_jax.checkpoints.store import Store
    from tinker_jax.types.errors import StorageError

    home, run, how = sys.argv[1:]
    if how == "kill":
        save = ocp.Checkpointer.save
        def save_then_die(self, path, *args, **kwargs):
            save(self, path, *args, **kwargs)
            if path.name == "adapter":
                os.kill(os.getpid(), signal.SIGKILL)
        ocp.Checkpointer.save = save_then_die
    else:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
    try:
        Store(home).write(
            run, "weights", "a", lambda d: state.save_adapter(d, adapter(5), optimizer(5), META),
            has_optimizer=True, overwrite=True,
        )
    except StorageError as error:
        sys.exit(str(error))
"""


@pytest.mark.parametrize("how", ["kill", "full"])
def test_an_interrupted_save_leaves_the_older_checkpoint_readable(tmp_path, how):
    store = Store(tmp_path)
    store.create_run(run_record())
    path = store.write(
        RUN, "weights", "a", lambda d: state.save_adapter(d, adapter(0), optimizer(0), META), has_optimizer=True
    ).path
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(INTERRUPTED), str(tmp_path), RUN, how],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        check=False,
    )
    if how == "kill":
        assert done.returncode == -signal.SIGKILL, done.stderr
    else:
        assert done.returncode == 1 and "cannot write checkpoint data" in done.stderr, done.stderr
        assert "File too large" in done.stderr
    got, moments = state.load_adapter(Store(tmp_path).get(path).directory, abstract(adapter(0)), abstract(optimizer(0)))
    assert_identical(got, adapter(0))
    assert_identical(moments, optimizer(0))
