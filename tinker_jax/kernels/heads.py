"""Heads of an attention: how many there are, how wide they are, and what a token leaves in the cache."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Heads:
    """Numbers that attention and its cache are made for.

    Args:
        N: query heads.
        K: key heads; N is a multiple.
        H: width of queries and keys.
        values: width of a value; None: H.
        latent: multi-head latent attention (DeepSeek-V2, arXiv:2405.04434) in its absorbed form. K is 1, the cache holds one
            vector of H numbers a token, and its first `values` numbers are the value, too.
    """

    N: int
    K: int
    H: int
    values: int | None = None
    latent: bool = False

    def __post_init__(self) -> None:
        if self.N % self.K:
            raise ValueError(f"N={self.N} query heads cannot share K={self.K} key heads: N must be a multiple of K.")
        if self.latent and (self.K != 1 or self.V > self.H):
            raise ValueError(f"latent heads want K=1 and values of at most H={self.H} numbers, got K={self.K} and {self.V}.")

    @property
    def V(self) -> int:
        """Width of a value."""
        return self.H if self.values is None else self.values

    def of_device(self, tensor: int) -> Heads:
        """What each device has where a mesh cuts heads into `tensor` parts.

        Key heads are cut where that divides them, their query heads with them. A single key head lies on every device and the
        query heads alone are cut. Else nothing is: a device's query heads would read a part of the key heads.
        """
        if self.K % tensor == 0:
            return replace(self, N=self.N // tensor, K=self.K // tensor)
        return replace(self, N=self.N // tensor) if self.K == 1 and self.N % tensor == 0 else self

    def cached(self, tensor: int = 1) -> int:
        """Numbers that a token takes in one layer's cache, on each device where a mesh cuts heads into `tensor` parts."""
        return self.H if self.latent else self.of_device(tensor).K * (self.H + self.V)
