"""The interpreter leaves cleanly whatever the engine is doing."""

import signal
import subprocess
import sys
import time

import pytest

SCRIPT = """
import sys, tinker_jax as tinker
service = tinker.ServiceClient()
client = service.create_lora_training_client(base_model={model!r}, rank=2).result()
data = [tinker.Datum(tinker.ModelInput.from_ints([5, 6, 7]), {{"target_tokens": [6, 7, 8]}})]
futures = [client.forward_backward(data, "cross_entropy") for _ in range(200)]
sampler = client.save_weights_and_get_sampling_client().result()
sampling = sampler.sample(tinker.ModelInput.from_ints([5]), 4, tinker.SamplingParams(max_tokens=400, stop=[]))
{end}
"""


@pytest.mark.parametrize(
    ("end", "code"), [("", 0), ("sys.exit(3)", 3), ("raise KeyboardInterrupt", 130), ("service.close('success').result(60)", 0)]
)
def test_a_script_that_ends_with_requests_under_way_exits_at_once_and_silently(checkpoint, tmp_path, end, code):
    script = SCRIPT.format(model=str(checkpoint("qwen3")), end=end)
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, timeout=240)
    assert done.returncode in (code, -2 if code == 130 else code)
    noise = [line for line in done.stderr.splitlines() if line.strip() and "Loading" not in line]
    assert not noise or (code == 130 and noise[-1].startswith("KeyboardInterrupt") and len(noise) < 6), done.stderr


CUSTOM = """
import threading, time, tinker_jax as tinker
import jax.numpy as jnp
service = tinker.ServiceClient()
client = service.create_lora_training_client(base_model={model!r}, rank=2).result()
data = [tinker.Datum(tinker.ModelInput.from_ints([5, 6, 7]), {{"target_tokens": [6, 7, 8]}})]
begun = threading.Event()

def loss(data, logprobs):
    begun.set()
    x, end = jnp.ones((300, 300)), time.monotonic() + 2
    while time.monotonic() < end:
        x = jnp.sin(x @ x)
    return -sum(lp.sum() for lp in logprobs), {{}}

client.forward_backward_custom(data, loss, backend="jax")
begun.wait()
"""


def test_a_script_that_ends_while_its_own_loss_computes_exits_cleanly(checkpoint):
    script = CUSTOM.format(model=str(checkpoint("qwen3")))
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr


COMPILING = """
import jax, signal, time, tinker_jax as tinker
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it in what it runs in the background
service = tinker.ServiceClient()
client = service.create_lora_training_client(base_model={model!r}, rank=2).result()
data = [tinker.Datum(tinker.ModelInput.from_ints([5] * 60), {{"target_tokens": [6] * 60}}) for _ in range(60)]

def compile(lowered, *args, **options):
    print("compiling", flush=True)
    time.sleep(300)

jax.stages.Lowered.compile = compile
future = client.forward_backward(data, "cross_entropy")
print("waiting", flush=True)
try:
    future.result()
except KeyboardInterrupt:
    print("not flushed")
    raise
"""


def test_ctrl_c_during_a_compilation_ends_the_script_and_says_what_was_left(checkpoint):
    script = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", COMPILING.format(model=str(checkpoint("qwen3")))],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert script.stdout is not None
    told = {script.stdout.readline().strip()}
    while told < {"compiling", "waiting"}:
        told.add(script.stdout.readline().strip())
    time.sleep(1)  # in `result`
    script.send_signal(signal.SIGINT)
    stdout, stderr = script.communicate(timeout=100)  # far less than the compilation would take
    assert script.returncode == -signal.SIGINT
    assert "not flushed" in stdout
    assert "KeyboardInterrupt" in stderr
    assert "tinker_jax: interrupted, left without waiting for: " in stderr
