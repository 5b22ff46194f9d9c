# ruff: noqa: E402
"""Settings every test shares: CPU, strict dtypes, a compilation cache of the suite's own, no hub access."""

import gc
import os
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0")
os.environ.setdefault("TINKER_JAX_HOME", tempfile.mkdtemp(prefix="tinker_jax_tests_"))
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(tempfile.gettempdir()) / "tinker_jax_test_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")

import aot
import pytest
import tiny
from jax.experimental import topologies


@pytest.fixture(scope="module", autouse=True)
def room_for_programs():
    """A compiled program is about 25 mappings of memory, and Linux gives a process 65,530: beyond that XLA crashes."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 40_000:
        gc.collect()
        jax.clear_caches()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """`checkpoint("qwen3")` → directory of a tiny random model, the same for the whole run."""
    made = {}

    def get(family):
        if family not in made:
            made[family] = tiny.save(family, tmp_path_factory.mktemp("models") / family)
        return made[family]

    return get


@pytest.fixture
def h200(monkeypatch):
    """Mesh of one H200 that need not be there. cuDNN asks the devices of this process, not those compiled for."""
    pytest.importorskip("jax_cuda13_plugin")
    from jax._src.cudnn import fused_attention_stablehlo as private

    monkeypatch.setattr(private, "check_compute_capability", lambda capability: capability <= "9.0")
    monkeypatch.setitem(os.environ, "JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    devices = topologies.get_topology_desc("", platform="cuda", target_config=aot.H200, topology="1x1x1").devices
    return aot.mesh_of(devices, (1, 1, 1))


def pytest_collection_modifyitems(items):
    if jax.default_backend() != "gpu":
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no GPU"))
