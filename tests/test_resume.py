"""A run that was killed and restored in another process goes on bit for bit, through the public API."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest

SCRIPT = """
import os, signal, sys
import numpy as np
import tinker_jax as tinker

mode, model, out = sys.argv[1:]
service = tinker.ServiceClient()

def batch(seed):
    rng = np.random.default_rng(seed)
    rows = rng.integers(2, 300, (3, 31)).tolist()
    return [tinker.Datum(tinker.ModelInput.from_ints(r[:-1]), {"target_tokens": r[1:]}) for r in rows]

def train(client, steps):
    for step in steps:
        client.forward_backward(batch(step), "cross_entropy")
        client.optim_step(tinker.AdamParams(learning_rate=1e-2, weight_decay=0.1, grad_clip_norm=1.0))

if mode in ("whole", "killed"):
    client = service.create_lora_training_client(model, rank=4, seed=7).result()
    train(client, range(3))
    path = client.save_state("middle").result().path
    if mode == "killed":
        train(client, range(3, 5))
        client.save_state("later")  # under way, or not begun, when the process dies
        print(path, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
else:
    path = open(out + ".path").read()
    restore = {
        "warm": service.create_training_client_from_state_with_optimizer, "cold": service.create_training_client_from_state
    }[mode]
    client = restore(path).result()
train(client, range(3, 6))
output = client.forward(batch(9), "cross_entropy").result()
np.save(out, np.concatenate([d["logprobs"].to_numpy() for d in output.loss_fn_outputs]))
"""


@pytest.fixture(
    params=["qwen3", *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen3_moe", "gpt_oss", "deepseek_v3"))]
)
def run(request, checkpoint, tmp_path):
    def go(mode, out):
        env = os.environ | {"TINKER_JAX_HOME": str(tmp_path / "home"), "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-W", "ignore", "-c", SCRIPT, mode, str(checkpoint(request.param)), str(tmp_path / out)]
        return subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)

    return go


def test_a_killed_and_restored_run_equals_the_uninterrupted_one_bit_for_bit(run, tmp_path):
    assert (done := run("whole", "whole.npy")).returncode == 0, done.stderr
    killed = run("killed", "killed.npy")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    for mode in ("warm", "cold"):
        (tmp_path / f"{mode}.npy.path").write_text(killed.stdout.strip())
        assert (done := run(mode, f"{mode}.npy")).returncode == 0, done.stderr
    whole, warm, cold = (np.load(tmp_path / f"{name}.npy") for name in ("whole", "warm", "cold"))
    np.testing.assert_array_equal(warm, whole)
    assert np.abs(cold - whole).max() > 1e-5
