"""A micro-batch on a CPU: one program for a layer's forward pass and one for its backward pass, called for all layers in turn.

A program over the whole model keeps what its layers made in arrays with a layer axis, which are filled with zeros, written to
and read from again, and takes one piece of memory for all its temporaries, which the system clears at every call. Here nothing
is copied, the first layers are at work while the programs of the last are compiled, and two micro-batches run side by side
where memory allows: what only one core can do in one of them is hidden behind the other.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import wait
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from tinker_jax import lora as lora_lib
from tinker_jax.memory import AT_ONCE_CPU
from tinker_jax.models.block import Packed, Params
from tinker_jax.models.config import ModelConfig
from tinker_jax.models.decoder import (
    activation_dtype,
    attention_of,
    embed,
    final_norm,
    in_order,
    outside,
    rematerialised,
    rope_tables,
    ropes,
    stacks,
)
from tinker_jax.programs import DaemonThreads, Program, precision
from tinker_jax.sharding import host_view, views, views_of_layers
from tinker_jax.training.objective import KNOWN, Call, Output, logprobs_of_hidden, loss_of_hidden
from tinker_jax.training.packing import MicroBatch


class LayerByLayer:
    """Training programs of a model on JAX's default device, a CPU.

    Args:
        cfg: shape of the model.
        params: base weights, on that device.
        mesh: of that device.
        add: program that sums two adapters' trees and donates the second.
    """

    def __init__(self, cfg: ModelConfig, params: Params, mesh: Mesh, add: Program) -> None:
        self._cfg, self._mesh, self._add = cfg, mesh, add
        self._ends, self._order = views(outside(cfg, params)), [(stack.name, at) for stack, at in in_order(cfg)]
        self._stacks = {stack.name: stack for stack in stacks(cfg)}
        self._layers = {name: views_of_layers(stack.params(params), len(stack.layers)) for name, stack in self._stacks.items()}
        self._numbers = [jax.device_put(np.int32(at)) for at in range(cfg.L)]
        self._attention = attention_of(cfg, mesh, activation_dtype(params))
        self._embed = Program(self._embed_tokens, "embedding")
        self._forward = Program(self._forward_layer, "layer forward", static=("stack", "remat", "backward"))
        self._logprobs = Program(self._logprobs_alone, "log-probabilities")
        self._loss = Program(self._loss_and_gradients, "loss", static=("loss_fn", "backward"))
        self._backward = Program(self._backward_layer, "layer backward", static=("stack", "remat"), donate=(0, 1))
        self._threads = DaemonThreads(AT_ONCE_CPU - 1, "tinker_jax-training")

    @property
    def programs(self) -> int:
        """Number of compiled programs."""
        return sum(p.count for p in (self._embed, self._forward, self._logprobs, self._loss, self._backward))

    def close(self) -> None:
        """Gives the weights back; nothing can be run any more."""
        self._threads.end(time.monotonic() + 30)
        self._layers, self._ends = {}, {}
        jax.device_put(np.int32(0))  # JAX lets go of memory that it borrowed from NumPy at its next call alone

    def run(
        self, call: Call, others_wait: Callable[[], bool]
    ) -> Generator[None, None, tuple[list[Output], lora_lib.Adapter | None]]:
        """Computes the micro-batches: (the output of each, the call's gradients).

        Pauses between micro-batches, with the device at rest, while `others_wait`, which any thread may ask, says so. Returns
        when the last ones are dispatched; waits for those before them.
        """
        # Without a device of its own, as everything that the programs get: they would be compiled again for another placing.
        adapter = jax.device_put(jax.tree.map(host_view, call.adapter))
        outputs: list[Any] = [None] * len(call.batches)
        sizes = [batch.tokens.size for batch in call.batches]
        alone, *together = (_Sum(numbers) for numbers in _share(sizes, call.at_once))
        sums = [one for one in (alone, *together) if one.left]
        if call.backward and len(sums) > 1:
            self._add.prepare(call.adapter, call.adapter, shape=call.adapter_shape)
        now = precision()

        def go_on(one: _Sum) -> None:
            with jax.default_matmul_precision(now):
                self._go_on(call, adapter, one, outputs, others_wait)

        for side_by_side in ([alone], together):
            while any(one.left for one in side_by_side):
                first, *others = side_by_side
                futures = [self._threads.submit(go_on, one) for one in others]
                try:
                    go_on(first)
                finally:
                    wait(futures)
                for future in futures:
                    future.result()
                left = any(one.left for one in sums)
                if left or others_wait():
                    jax.block_until_ready((outputs, [one.total for one in sums]))
                if left:
                    yield
        if not call.backward:
            return outputs, None
        places = jax.tree.map(lambda x: x.sharding, call.adapter)
        grads, *more = (jax.device_put(one.total, places) for one in sums)
        for total in more:
            grads = self._add(grads, total, shape=call.adapter_shape)
        return outputs, grads

    def _go_on(
        self, call: Call, adapter: lora_lib.Adapter, one: _Sum, outputs: list[Any], others_wait: Callable[[], bool]
    ) -> None:
        """Micro-batches until others wait, at least as many tokens as the largest has. Each begins when the one before it is
        done, and what that kept is gone."""
        turn, tokens = max(batch.tokens.size for batch in call.batches), 0
        if call.backward and one.total is None and one.left:
            zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), adapter)
            one.total = jax.device_put(zeros, may_alias=False)  # it will be written to
        while one.left:
            batch = call.batches[one.left[0]]
            tokens += batch.tokens.size
            if tokens > turn and others_wait():
                return
            jax.block_until_ready((one.last, one.total))
            one.last, one.total = self._micro_batch(call, adapter, batch, one.total)
            outputs[one.left.pop(0)] = one.last

    def _micro_batch(
        self, call: Call, adapter: lora_lib.Adapter, batch: MicroBatch, total: lora_lib.Adapter | None
    ) -> tuple[Output, lora_lib.Adapter | None]:
        """(its output, `total` with its gradients)"""
        head, scale, total = adapter.get("lm_head"), np.float32(call.scale), {**(total or {})}
        factors = {name: adapter.get(name, {}) for name in self._layers}
        arrays, backward = jax.device_put(batch.arrays), call.backward and any(factors.values())
        keep = backward or call.one_program  # one program of a layer serves both
        layer: Any = {"shape": f"{batch.shape} {call.adapter_shape}", "remat": call.remat}
        of_head = f"rank={call.rank} " if head else ""
        of_logprobs = f"{batch.shape} {of_head}{list(batch.inputs['target_tokens'].shape[2:])}"
        loss: Any = {
            "shape": f"{batch.shape} {of_head}{call.loss_shape(batch)}",
            "loss_fn": call.loss_fn,
            "backward": call.backward,
        }
        tokens = self._ends, arrays["tokens"], arrays["positions"]

        def inputs(stack: str, at: int, h_MD: Any, tables: Any) -> tuple[Any, ...]:
            return self._layers[stack][at], factors[stack], self._numbers[at], h_MD, scale, tables, arrays["segments"]

        def prepare() -> None:
            """Has what is needed compiled on other threads, in the order in which it is needed."""
            self._embed.prepare(*tokens, shape=batch.shape)
            h_MD, tables = self._embed.shapes(*tokens)
            for stack in self._layers:
                self._forward.prepare(*inputs(stack, 0, h_MD, tables), **layer, stack=stack, backward=keep)
            known = {}
            if call.one_program:
                logprobs = self._ends, head, scale, h_MD, arrays["target_tokens"]
                self._logprobs.prepare(*logprobs, shape=of_logprobs)
                known = {KNOWN: self._logprobs.shapes(*logprobs)}
            self._loss.prepare(total.get("lm_head"), self._ends, head, scale, h_MD, arrays | known, call.config, **loss)
            for stack in reversed(self._layers) if backward else ():
                own = inputs(stack, 0, h_MD, tables)
                g_MD, kept, _ = self._forward.shapes(*own, remat=call.remat, stack=stack, backward=True)
                self._backward.prepare(total.get(stack, {}), g_MD, kept, *own, **layer, stack=stack)

        ready = all(self._forward.is_ready(**layer, stack=stack, backward=keep) for stack in self._layers)
        if not (ready and self._loss.is_ready(**loss)):
            prepare()
        h_MD, tables = self._embed(*tokens, shape=batch.shape)
        passed, reports = [], []
        for stack, at in self._order:
            own = inputs(stack, at, h_MD, tables)
            h_MD, kept, report = self._forward(*own, **layer, stack=stack, backward=keep)
            reports.append(report)
            if backward:
                passed.append((stack, kept, own))
        if call.one_program:
            arrays[KNOWN] = self._logprobs(self._ends, head, scale, h_MD, arrays["target_tokens"], shape=of_logprobs)
        args = total.get("lm_head"), self._ends, head, scale, h_MD, arrays, call.config
        g_MD, total_head, logprobs, raw = self._loss(*args, **loss)
        if not call.backward:
            return Output(logprobs, raw, reports), None
        while passed:
            stack, kept, own = passed.pop()
            total[stack], g_MD = self._backward(total.get(stack, {}), g_MD, kept, *own, **layer, stack=stack)
        total["lm_head"] = total_head
        return Output(logprobs, raw, reports), {name: x for name, x in total.items() if x}

    # ---- programs ----

    def _embed_tokens(self, ends, tokens, positions):
        return embed(ends, tokens), rope_tables(self._cfg, positions.reshape(-1))

    def _forward_layer(self, params, factors, at, h_MD, scale, tables, segments, *, stack, remat, backward):
        """(hidden states, what `_backward_layer` takes as `kept`, what the layer reports)"""
        layer = self._layer(stack, params, scale, tables, segments, remat)
        own = _one_of(factors, at)
        if not backward:
            h_out_MD, report = layer(h_MD, own)
            return h_out_MD, [], report
        h_out_MD, pullback, report = jax.vjp(layer, h_MD, own, has_aux=True)
        leaves, given = jax.tree.leaves(pullback), _ids((params, own, h_MD, scale, tables, segments))
        return h_out_MD, [x for x in leaves if id(x) not in given], report

    def _backward_layer(self, total, g_MD, kept, params, factors, at, h_MD, scale, tables, segments, *, stack, remat):
        """(gradients of all layers with this one's added, gradient of its input)"""
        own = _one_of(factors, at)
        # Traced as in the forward pass, whose results stand in for what this would compute again: XLA drops that.
        _, pullback, _ = jax.vjp(self._layer(stack, params, scale, tables, segments, remat), h_MD, own, has_aux=True)
        (leaves, tree), given = jax.tree.flatten(pullback), _ids((params, own, h_MD, scale, tables, segments))
        kept = iter(kept)
        g_MD, grads = jax.tree.unflatten(tree, [x if id(x) in given else next(kept) for x in leaves])(g_MD)

        def add(x, g):
            return jax.lax.dynamic_update_index_in_dim(x, jax.lax.dynamic_index_in_dim(x, at, keepdims=False) + g, at, 0)

        return jax.tree.map(add, total, grads), g_MD

    def _layer(self, stack, params, scale, tables, segments, remat):
        tokens, block = Packed(segments, ropes(self._cfg, tables), self._attention, self._mesh), self._stacks[stack].block

        def layer(h_MD, factors):
            return block(params, h_MD, tokens, lora_lib.scaled(factors, scale))

        return rematerialised(layer, remat)

    def _logprobs_alone(self, ends, head, scale, h_MD, targets):
        h_MD, head = self._under_head(ends, head, scale, h_MD)
        return logprobs_of_hidden(self._cfg, ends, self._mesh, h_MD, head, targets)[0]

    def _under_head(self, ends, head, scale, h_MD):
        """(hidden states after the final norm, the head's adapter with its scale)"""
        h_MD = final_norm(self._cfg, ends)(h_MD)
        return h_MD, None if head is None else lora_lib.scaled(head, scale)

    def _loss_and_gradients(self, total_head, ends, head, scale, h_MD, batch, config, *, loss_fn, backward):
        """(gradient of the hidden states, gradients of the head's adapter with these added, log-probabilities, raw metrics)"""

        def loss(h_MD, head):
            h_MD, head = self._under_head(ends, head, scale, h_MD)
            return loss_of_hidden(self._cfg, ends, self._mesh, loss_fn, h_MD, head, batch, config)

        if not backward:
            _, (logprobs, raw) = loss(h_MD, head)
            return None, None, logprobs, raw
        (g_MD, grads), (logprobs, raw) = jax.grad(loss, argnums=(0, 1), has_aux=True)(h_MD, head)
        return g_MD, jax.tree.map(jnp.add, total_head, grads), logprobs, raw


@dataclass
class _Sum:
    """Micro-batches that run one after the other.

    Attributes:
        left: numbers of those that have not begun.
        total: sum of the gradients of the others.
        last: output of the one that began last.
    """

    left: list[int]
    total: lora_lib.Adapter | None = None
    last: Output | None = None


def _share(sizes: Sequence[int], at_once: int) -> list[list[int]]:
    """Numbers of the micro-batches that run with no other beside them, then those of each thread.

    The same for the same sizes, since it decides in which order sums are made.
    """
    alone = [number for number, size in enumerate(sizes) if 2 * size > at_once]
    others = [number for number in range(len(sizes)) if number not in alone]
    threads: list[list[int]] = [[] for _ in range(min(AT_ONCE_CPU, len(others)))]
    for number in others:
        min(threads, key=lambda thread: sum(sizes[i] for i in thread)).append(number)
    return [alone, *threads]


def _one_of(stacked: Any, at: jax.Array) -> Any:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, at, keepdims=False), stacked)


def _ids(tree: Any) -> set[int]:
    return {id(x) for x in jax.tree.leaves(tree)}
