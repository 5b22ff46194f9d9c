"""What a part of a layer holds of a token in training, from which memory is planned."""

from __future__ import annotations

from dataclasses import dataclass

ADAPTER_RANK = 32
"""Tinker's default: no adapter is known when memory is planned."""


@dataclass(frozen=True)
class Sizes:
    """Numbers a token.

    Attributes:
        products: made by matrix products, kept where the policy keeps these (`tinker_jax.lora.PRODUCTS`).
        residuals: of attention, kept where the policy keeps these.
        residuals_f32: the same, float32 whatever the dtype of activations.
        working: at work while it is computed again with its gradients.
    """

    products: int = 0
    residuals: int = 0
    residuals_f32: int = 0
    working: int = 0

    def __add__(self, other: Sizes) -> Sizes:
        return Sizes(
            self.products + other.products,
            self.residuals + other.residuals,
            self.residuals_f32 + other.residuals_f32,
            self.working + other.working,
        )
