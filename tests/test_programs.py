"""What is compiled once is there again in the next process."""

import os
import subprocess
import sys

import pytest

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
    assert run(tmp_path) == ["False", str(tmp_path / "compiled")]
    assert run(tmp_path) == ["True", str(tmp_path / "compiled")]


@pytest.mark.parametrize(
    ("env", "directory"),
    [({"JAX_COMPILATION_CACHE_DIR": "{mine}"}, "{mine}"), ({"JAX_ENABLE_COMPILATION_CACHE": "false"}, "None")],
)
def test_a_place_of_the_users_own_and_none_at_all_are_respected(tmp_path, env, directory):
    mine = str(tmp_path / "mine")
    assert run(tmp_path, **{k: v.format(mine=mine) for k, v in env.items()}) == ["False", directory.format(mine=mine)]
    assert not (tmp_path / "compiled").exists()
