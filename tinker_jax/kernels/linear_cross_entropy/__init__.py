"""Log-probabilities of chosen tokens under a linear head, without ever holding `[tokens, vocab]` logits."""

from .api import LinearCrossEntropyOutput, default_block, default_tile, linear_cross_entropy, linear_top_k
from .reference import head_logits

__all__ = ["LinearCrossEntropyOutput", "default_block", "default_tile", "head_logits", "linear_cross_entropy", "linear_top_k"]
