"""Causal attention over packed rows."""

from tinker_jax.kernels.attention.api import attention as attention
