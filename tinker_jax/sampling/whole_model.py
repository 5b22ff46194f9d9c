"""The sampler's programs where one covers the whole model: on accelerators, and on meshes of several devices."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from tinker_jax import sharding
from tinker_jax.kernels.linear_cross_entropy import head_logits
from tinker_jax.lora import Adapter, joined
from tinker_jax.models.block import Params
from tinker_jax.models.caches import Caches, Pools
from tinker_jax.models.config import ModelConfig
from tinker_jax.models.decoder import Decoder, stacks, unembedding
from tinker_jax.programs import Program
from tinker_jax.sampling.adapter_slots import adapter_rank, batch_name
from tinker_jax.sampling.drawing import Drawn, DrawOptions, Rows, advance, nothing_drawn, own_slots


class WholeModel:
    """Prefill is one program, and so is a chunk of decode steps, which never leaves the device.

    Args:
        cfg: shape of the model.
        params: base weights, placed on the mesh. They are arguments of every program, never constants in one.
        caches: of the model and its mesh.
        steps: most tokens a row draws in a chunk.
        unstack: cut each layer's weights out of the stack once a chunk, see `tinker_jax.memory.plan`.
    """

    def __init__(self, cfg: ModelConfig, params: Params, caches: Caches, steps: int, unstack: bool) -> None:
        self._cfg, self._params, self._caches, self._steps, self._unstack = cfg, params, caches, steps, unstack
        self._everywhere = sharding.replicated(caches.mesh)
        self._prefill = Program(self.prefill_program, "prefill", donate=[2])
        self._decode = Program(self.decode_program, "decode", static=["top"], donate=[2])

    @property
    def programs(self) -> int:
        """Number of compiled programs."""
        return self._prefill.count + self._decode.count

    def prefill(
        self, adapter: Adapter | None, pools: Pools, tokens_RT: Any, positions_RT: Any, tables_RW: Any, slots_R2: Any
    ) -> tuple[jax.Array, Pools]:
        """Hidden states [R, T, D], and the pools, which are donated."""
        args = self._params, adapter, pools, tokens_RT, positions_RT, tables_RW, slots_R2
        return self._prefill(*args, shape=batch_name(tokens_RT.shape, adapter, tables_RW.shape[1]))

    def decode(self, adapter: Adapter | None, pools: Pools, rows: Rows, options: DrawOptions) -> tuple[Pools, Rows, Drawn]:
        """Up to `steps` tokens for every live row; the pools are donated. The program always has the filters.

        Returns:
            The pools, the rows as they will stand after it, and what they will have drawn; nothing is waited for.
        """
        rows = jax.device_put(rows, self._everywhere)  # as the program returns them: the same program takes these
        shape = batch_name(rows.token.shape, adapter, rows.table.shape[1])
        return self._decode(self._params, adapter, pools, rows, top=options.top, shape=shape)

    def prepare_prefill(
        self, adapter: Adapter | None, pools: Pools, tokens_RT: Any, positions_RT: Any, tables_RW: Any, slots_R2: Any
    ) -> None:
        """Has what a prefill of this shape needs compiled on another thread."""
        args = self._params, adapter, pools, tokens_RT, positions_RT, tables_RW, slots_R2
        self._prefill.prepare(*args, shape=batch_name(tokens_RT.shape, adapter, tables_RW.shape[1]))

    def prepare_decode(self, adapter: Adapter | None, pools: Pools, rows: Rows, options: DrawOptions) -> None:
        """Has what decoding such rows needs compiled on another thread."""
        shape = batch_name(rows.token.shape, adapter, rows.table.shape[1])
        rows = jax.device_put(rows, self._everywhere)
        self._decode.prepare(self._params, adapter, pools, rows, top=options.top, shape=shape)

    def is_ready(self, S: int, W: int, adapter: Adapter | None, options: DrawOptions) -> bool:
        """Is the program compiled that decodes S rows of up to W pages?"""
        return self._decode.is_ready(batch_name((S,), adapter, W), top=options.top)

    def is_ready_to_prefill(self, shape: tuple[int, int], W: int, adapter: Adapter | None) -> bool:
        """Is the program compiled that prefills a batch of this shape, its rows of up to W pages?"""
        return self._prefill.is_ready(batch_name(shape, adapter, W))

    def forget_adapter(self) -> None:
        """There is nothing to do: no adapter is kept."""

    def close(self) -> None:
        """Gives the weights back; nothing can be run any more."""
        self._params = {}

    def prefill_program(self, params, adapter, pools, tokens_RT, positions_RT, tables_RW, slots_R2):
        R, T = tokens_RT.shape
        decoder, slots = Decoder(self._cfg, params), own_slots(slots_R2, adapter_rank(adapter))
        slots_MR = None if slots is None else jnp.repeat(slots, T, axis=0)
        h_MD, pools = decoder.extend(tokens_RT, positions_RT, tables_RW, pools, adapter, slots_MR, caches=self._caches)
        return h_MD.reshape(R, T, -1), pools

    def decode_program(self, params, adapter, pools, rows, *, top):
        """Ends early when no row is live."""
        decoder, kernel_VD = Decoder(self._cfg, params), unembedding(self._cfg, params)
        head = (adapter or {}).get("lm_head")
        if adapter is not None:  # what every step would else do with the factors
            adapter = {
                stack.name: joined(adapter[stack.name], stack.block.same_input, jnp.concatenate)
                for stack in stacks(self._cfg)
                if stack.name in adapter
            }
            adapter = jax.tree.map(lambda x: x.astype(kernel_VD.dtype), adapter)
        layers = decoder.unstacked(adapter) if self._unstack else None
        rows = Rows(*(jnp.asarray(x) for x in rows))
        table, slots = rows.table, own_slots(rows.slots, adapter_rank(adapter))

        def unfinished(carry):
            step, _, rows, _ = carry
            return (step < self._steps) & jnp.any(rows.live)

        def one_step(carry):
            step, pools, rows, drawn = carry
            position_S1, token_S1 = jnp.where(rows.live, rows.position, -1)[:, None], rows.token[:, None]
            h_SD, pools = decoder.extend(
                token_S1, position_S1, table, pools, adapter, slots, caches=self._caches, layers=layers
            )
            rows, drawn = advance(head_logits(h_SD, kernel_VD, head, slots), rows, drawn, step)
            return step + 1, pools, rows, drawn

        start = jnp.int32(0), pools, rows, jax.tree.map(jnp.asarray, nothing_drawn(rows.token.shape[0], self._steps, top))
        _, pools, rows, drawn = jax.lax.while_loop(unfinished, one_step, start)
        return pools, jax.lax.with_sharding_constraint(rows, self._everywhere), drawn
