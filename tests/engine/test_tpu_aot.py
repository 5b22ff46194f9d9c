"""Training step and sampler of Qwen3-8B compile for TPU slices, with Pallas' attention kernels, within the memory of a chip."""

import dataclasses
import os

import aot
import pytest
from jax.experimental import topologies

pytestmark = pytest.mark.tpu_aot

# Of the 16 and 32 GiB on the chip, what the compiler may use.
V5E, V6E = int(15.75 * 2**30), int(31.25 * 2**30)


@pytest.mark.timeout(3000)
@pytest.mark.parametrize(
    ("topology", "shape", "chip_bytes"),
    [
        ("v5e:4x4", (1, 16, 1), V5E),
        ("v5e:4x4", (1, 4, 4), V5E),
        ("v6e:2x4", (1, 8, 1), V6E),
        ("v6e:2x4", (2, 2, 2), V6E),
    ],
)
def test_the_step_holds_splash_attention_and_fits_the_chip(topology, shape, chip_bytes):
    pytest.importorskip("libtpu")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    devices = topologies.get_topology_desc(topology, platform="tpu").devices
    lowered = aot.lower_step(aot.mesh_of(devices, shape), chip_bytes)
    text = lowered.as_text()
    for phase in ("fwd_segmented_residuals", "dq_segmented_no_residuals", "dkv_segmented_no_residuals"):
        assert f"splash_mha_{phase}" in text
    assert aot.needed_bytes(lowered.compile()) < chip_bytes


@pytest.mark.timeout(3000)
@pytest.mark.parametrize("shape", [(1, 4, 4), (2, 1, 8)])
def test_decode_and_prefill_hold_paged_attention_and_fit_the_chip(shape):
    pytest.importorskip("libtpu")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    devices = topologies.get_topology_desc("v5e:4x4", platform="tpu").devices
    decode, prefill, pool_bytes = aot.lower_sampler(aot.mesh_of(devices, shape), V5E)
    for lowered in (decode, prefill):
        assert "ragged_paged_attention" in lowered.as_text()
        compiled = lowered.compile()
        assert compiled.memory_analysis().alias_size_in_bytes >= pool_bytes
        assert aot.needed_bytes(compiled) < V5E / 2


@pytest.mark.timeout(3000)
@pytest.mark.parametrize(("rows", "longest"), [(32, 262_144), (256, 32_768)])
def test_a_context_of_262144_tokens_decodes_in_tables_that_the_kernel_can_hold(rows, longest):
    pytest.importorskip("libtpu")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    devices = topologies.get_topology_desc("v6e:2x4", platform="tpu").devices
    cfg = dataclasses.replace(aot.QWEN3_8B, context_length=262_144)
    mesh = aot.mesh_of(devices, (1, 1, 8))
    for lowered in aot.lower_sampler(mesh, V6E, rows=rows, tokens=1024, cfg=cfg, longest=longest)[:2]:
        assert "ragged_paged_attention" in lowered.as_text()
        lowered.compile()
