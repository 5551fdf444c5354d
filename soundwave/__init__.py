"""Transcribe speech and ask about it, in Python.

import soundwave

model = soundwave.load("runs/my/sft/model")
print(model.transcribe("meeting.mp3", timestamps="word").text)
print(model.answer("clip.wav", "How many people speak?"))
"""

from core.audio import AudioError
from model.generation.timestamps import Word
from soundwave.recogniser import Options, SpeechModel, load
from soundwave.results import Answer, Segment, Transcription

__all__ = [
    "Answer",
    "AudioError",
    "Options",
    "Segment",
    "SpeechModel",
    "Transcription",
    "Word",
    "load",
]
