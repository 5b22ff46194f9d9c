"""What the whole-model programs are given."""

from types import SimpleNamespace

import numpy as np
import pytest

from tinker_jax.training.packing import pack
from tinker_jax.training.whole_model import WholeModel


@pytest.mark.parametrize(
    ("platform", "sequences", "most"), [("gpu", 1, 16), ("gpu", 15, 16), ("gpu", 16, 64), ("gpu", 63, 64), ("tpu", 1, 64)]
)
def test_a_gpu_sets_room_aside_for_as_many_segments_as_a_row_may_have(platform, sequences, most):
    """Padding is a segment, too."""
    (batch,) = pack([np.zeros(4, np.int32)] * sequences, [{}] * sequences, token_budget=4096)
    model = WholeModel.__new__(WholeModel)
    model._mesh = SimpleNamespace(devices=np.array([SimpleNamespace(platform=platform)]))
    assert model._most_segments(batch) == most
