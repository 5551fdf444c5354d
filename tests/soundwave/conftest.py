from __future__ import annotations

import numpy as np
import pytest
import torch

import soundwave
from tests.evaluation.conftest import folders, parts  # noqa: F401


def wave(seconds: float, seed: int = 0) -> np.ndarray:
    """A chirp in noise [S], 16 kHz."""
    random = np.random.default_rng(seed)
    time = np.arange(round(seconds * 16000)) / 16000
    chirp = np.sin(2 * np.pi * (150 + 40 * seed + 300 * time) * time)
    return (0.3 * chirp + 0.05 * random.standard_normal(len(time))).astype(np.float32)


@pytest.fixture(scope="session")
def speaker(folders):  # noqa: F811
    """A tiny random model of stage 2."""
    return soundwave.load(folders / "shrinking", device="cpu")


@pytest.fixture
def deaf(folders):  # noqa: F811
    """A model whose CTC head finds a blank in every frame."""
    model = soundwave.load(folders / "shrinking", device="cpu")
    with torch.no_grad():
        direction = torch.ones_like(model.network.alignment.norm.bias)
        model.network.alignment.norm.bias += direction
        model.network.ctc_head.blank_row.copy_(50 * direction)
    return model
