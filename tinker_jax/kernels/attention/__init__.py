"""Causal attention over packed rows."""

from tinker_jax.kernels.attention.api import Implementation as Implementation
from tinker_jax.kernels.attention.api import attention as attention
from tinker_jax.kernels.attention.cudnn import MAX_SEGMENTS as MAX_SEGMENTS
from tinker_jax.kernels.attention.mesh import attention_on as attention_on
from tinker_jax.kernels.attention.names import RESIDUALS as RESIDUALS
