"""Compressors: CTC peaks (the method), CIF, and as baselines all frames and stacked frames."""

from model.compressors.base import (
    COMPRESSORS,
    Compressed,
    Compressor,
    CTCView,
    compressor_of,
    frame_rate,
    options_of,
    register_compressor,
)
from model.compressors.cif import CIF
from model.compressors.ctc_peaks import AllFrames, CTCPeaks
from model.compressors.stacked import Stacked

__all__ = [
    "CIF",
    "COMPRESSORS",
    "AllFrames",
    "CTCPeaks",
    "CTCView",
    "Compressed",
    "Compressor",
    "Stacked",
    "compressor_of",
    "frame_rate",
    "options_of",
    "register_compressor",
]
