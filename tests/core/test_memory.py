import numpy as np
import pytest
import torch

from core.memory import is_out_of_memory

MORE_THAN_THERE_IS = 1 << 48  # bytes


@pytest.mark.parametrize(
    "take",
    [
        lambda: torch.zeros(MORE_THAN_THERE_IS, dtype=torch.uint8),
        lambda: np.ones(MORE_THAN_THERE_IS, dtype=np.uint8),
        lambda: bytearray(MORE_THAN_THERE_IS),
    ],
    ids=["torch", "numpy", "python"],
)
def test_real_failures_are_recognised(take):
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        take()
    assert is_out_of_memory(caught.value)


def test_that_of_a_gpu_is_one_and_other_errors_are_none():
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_out_of_memory(RuntimeError("shapes differ"))
    assert not is_out_of_memory(ValueError("cannot allocate memory"))
