"""Importing the package is cheap, and its version stands in one place."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import tinker_jax

ROOT = Path(__file__).parents[2]

HEAVY = ("jax", "torch", "transformers", "numpy", "flax", "optax", "orbax", "etils", "tinker")


def run(code: str) -> dict:
    program = f"import json, sys, time\nstart = time.process_time()\n{code}\nprint(json.dumps(out))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_importing_the_package_takes_less_than_a_third_of_a_second_and_loads_nothing_heavy():
    out = run(
        f"import tinker_jax\nout = dict(cpu=time.process_time() - start, "
        f"loaded=[m for m in {HEAVY} if m in sys.modules], names=len(dir(tinker_jax)))"
    )
    assert out["loaded"] == []
    assert out["cpu"] < 0.3
    assert out["names"] >= len(tinker_jax.__all__)


def test_types_clients_and_configuration_need_neither_jax_nor_torch():
    out = run(
        "import tinker_jax as t\nfor name in t.__all__: getattr(t, name)\n"
        "t.ServiceClient(engine=t.EngineConfig()); t.Datum(t.ModelInput.from_ints([1]), {'weights': [1.0]})\n"
        "out = [m for m in ('jax', 'torch', 'transformers', 'flax') if m in sys.modules]"
    )
    assert out == []


def test_submodules_are_attributes_and_unknown_names_are_errors():
    out = run("import tinker_jax as t\nout = [t.types.Datum.__name__, t.checkpoints.__name__, hasattr(t, 'nonsense')]")
    assert out == ["Datum", "tinker_jax.checkpoints", False]


def test_the_version_is_the_one_in_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert tinker_jax.__version__ == project["project"]["version"]
    assert tinker_jax.__title__ == "tinker_jax"
