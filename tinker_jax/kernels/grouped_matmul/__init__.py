"""The matrix products of a mixture of experts: rows sorted by expert, each expert's rows times its own weight."""

from tinker_jax.kernels.grouped_matmul.api import Implementation as Implementation
from tinker_jax.kernels.grouped_matmul.api import goes_over_experts as goes_over_experts
from tinker_jax.kernels.grouped_matmul.api import grouped_matmul as grouped_matmul
from tinker_jax.kernels.grouped_matmul.dispatch import Dispatch as Dispatch
from tinker_jax.kernels.grouped_matmul.dispatch import by_expert as by_expert
from tinker_jax.kernels.grouped_matmul.dispatch import combine as combine
from tinker_jax.kernels.grouped_matmul.dispatch import spread as spread
from tinker_jax.kernels.grouped_matmul.loop import over_experts as over_experts
