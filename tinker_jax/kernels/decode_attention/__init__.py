"""Attention over keys and values kept in pages, for decoding and chunked prefill."""

from tinker_jax.kernels.decode_attention.api import Implementation as Implementation
from tinker_jax.kernels.decode_attention.api import PagedAttention as PagedAttention
from tinker_jax.kernels.decode_attention.api import paged_attention_on as paged_attention_on
from tinker_jax.kernels.decode_attention.pages import PAGE as PAGE
from tinker_jax.kernels.decode_attention.pages import Pages as Pages
