"""What is compiled once is there again in the next process."""

import os
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinker_jax.programs import DaemonThreads, Program

SCRIPT = """
import jax
from tinker_jax.programs import keep_compiled
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
keep_compiled({home!r})
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name.endswith("cache_hits")))
jax.jit(lambda x: x * 2 + 1)(3.0)
print(any(hits), jax.config.jax_compilation_cache_dir)
"""


def run(home, **env):
    env = {**{k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}, **env}
    done = subprocess.run([sys.executable, "-c", SCRIPT.format(home=str(home))], env=env, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout.split()


def test_a_second_process_finds_the_programs_of_the_first(tmp_path):
    assert run(tmp_path) == ["False", str(tmp_path / "programs")]
    assert run(tmp_path) == ["True", str(tmp_path / "programs")]


@pytest.mark.parametrize(
    ("env", "directory"),
    [({"JAX_COMPILATION_CACHE_DIR": "{mine}"}, "{mine}"), ({"JAX_ENABLE_COMPILATION_CACHE": "false"}, "None")],
)
def test_a_place_of_the_users_own_and_none_at_all_are_respected(tmp_path, env, directory):
    mine = str(tmp_path / "mine")
    assert run(tmp_path, **{k: v.format(mine=mine) for k, v in env.items()}) == ["False", directory.format(mine=mine)]
    assert not (tmp_path / "programs").exists()


def test_what_is_prepared_on_another_thread_is_not_compiled_again(caplog):
    program = Program(lambda x, y: x["a"] @ y, "prepared", donate=[1])
    shapes = {"a": jax.ShapeDtypeStruct((8, 8), jnp.float32)}, jax.ShapeDtypeStruct((8, 8), jnp.float32)
    assert not program.is_ready("8")
    program.prepare(*shapes, shape="8").result(60)
    assert program.is_ready("8") and not program.is_ready("16") and program.count == 1
    jax.config.update("jax_log_compiles", True)
    try:
        with caplog.at_level("WARNING"):
            program({"a": jnp.asarray(np.eye(8, dtype=np.float32))}, jnp.asarray(np.eye(8, dtype=np.float32)), shape="8")
    finally:
        jax.config.update("jax_log_compiles", False)
    assert not [r for r in caplog.records if "XLA compilation" in r.message and "lambda" in r.message]


def test_whoever_needs_a_variant_that_is_being_compiled_waits_for_it():
    program = Program(lambda x: jnp.sin(x) + 1, "shared")
    calls = [program.prepare(jax.ShapeDtypeStruct((4,), jnp.float32), shape="4") for _ in range(5)]
    assert all(call is calls[0] for call in calls)
    np.testing.assert_allclose(program(np.zeros(4, np.float32), shape="4"), 1)
    assert calls[0].done() and program.count == 1


def test_an_error_of_the_compiler_reaches_the_call_and_the_next_call_tries_again():
    broken = [True]

    def f(x):
        if broken[0]:
            raise ValueError("no such program")
        return x + 1

    program = Program(f, "broken")
    assert isinstance(program.prepare(np.float32(1), shape="").exception(60), ValueError)
    with pytest.raises(ValueError, match="no such program"):
        program(np.float32(1), shape="")
    broken[0] = False
    assert program(np.float32(1), shape="") == 2


def test_other_threads_compile_for_the_callers_precision(caplog):
    program, x = Program(lambda x: x @ x, "precise"), jnp.zeros((4, 4))

    def compilations():
        with jax.log_compiles(), caplog.at_level("WARNING"):
            caplog.clear()
            program(x, shape="4")
        return sum("XLA compilation" in record.message for record in caplog.records)

    with jax.default_matmul_precision("highest"):
        program.prepare(x, shape="4").result(60)
        assert compilations() == 0
    assert compilations() == 1, "another precision is another program"


def test_the_cache_on_disk_is_bounded_and_keeps_what_takes_a_tenth_of_a_second(tmp_path):
    script = SCRIPT.replace('jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)\n', "").replace(
        "print(any(hits), jax.config.jax_compilation_cache_dir)",
        "print(jax.config.jax_compilation_cache_max_size, jax.config.jax_persistent_cache_min_compile_time_secs)",
    )
    hidden = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")
    env = {k: v for k, v in os.environ.items() if k not in hidden}
    done = subprocess.run([sys.executable, "-c", script.format(home=str(tmp_path))], env=env, capture_output=True, text=True)
    assert done.stdout.split() == [str(4 << 30), "0.1"], done.stderr


def test_daemon_threads_work_side_by_side_return_and_raise_and_end_without_what_is_queued():
    threads, gate = DaemonThreads(2, "test"), threading.Barrier(3)
    side_by_side = [threads.submit(gate.wait, 60) for _ in range(2)]
    places = [gate.wait(60), *(future.result(60) for future in side_by_side)]
    assert sorted(places) == [0, 1, 2]
    assert threads.submit(int, "7").result(60) == 7
    with pytest.raises(ValueError, match="invalid literal"):
        threads.submit(int, "x").result(60)
    held = threading.Event()
    busy = [threads.submit(lambda: (gate.wait(60), held.wait(60))[1]) for _ in range(2)]
    gate.wait(60)
    queued = threads.submit(int, "7")
    assert not threads.end(time.monotonic() + 0.1)
    held.set()
    assert [future.result(60) for future in busy] == [True, True]
    assert threads.end(time.monotonic() + 60)
    assert not queued.done()
