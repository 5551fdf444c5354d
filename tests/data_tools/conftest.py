"""Small corpora made on the spot."""

import json

import numpy as np
import pytest
import soundfile


def tone(
    seconds: float, rate: int = 16000, hertz: float = 440.0, noise: float = 0.01, seed: int = 0
) -> np.ndarray:
    time = np.arange(round(seconds * rate)) / rate
    return (
        0.3 * np.sin(2 * np.pi * hertz * time)
        + noise * np.random.default_rng(seed).standard_normal(len(time))
    ).astype(np.float32)


@pytest.fixture
def corpus(tmp_path):
    """Eleven good clips in different formats and rates, one text-only sample, and one of each fault; ->
    manifest path."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    rows = []
    kinds = [
        ("wav", 16000, "PCM_16"),
        ("wav", 8000, "PCM_16"),
        ("flac", 16000, "PCM_16"),
        ("mp3", 11025, None),
        ("wav", 44100, "FLOAT"),
    ]
    for number in range(11):
        suffix, rate, subtype = kinds[number % len(kinds)]
        path = folder / f"clip {number}.{suffix}"
        soundfile.write(
            path, tone(0.4 + 0.1 * number, rate, 200 + 50 * number, seed=number), rate, subtype=subtype
        )
        rows.append(
            {"id": f"spk.{number}/é", "audio": path.name, "text": f"clip number {number}", "lang": "en"}
        )
    soundfile.write(folder / "stereo.wav", np.stack([tone(1.0), tone(1.0, hertz=300)], 1), 16000)
    rows.append(
        {
            "id": "stereo",
            "audio": str(folder / "stereo.wav"),
            "text": "two channels",
            "offset": 0.25,
            "duration": 0.5,
        }
    )
    rows.append({"id": "text", "prompt": "Say hello.", "response": "Hello.", "lang": "en"})
    soundfile.write(
        folder / "nan.wav", np.array([0.1, np.nan, 0.2], dtype=np.float32), 16000, subtype="FLOAT"
    )
    soundfile.write(folder / "empty.wav", np.zeros(0, dtype=np.float32), 16000)
    (folder / "broken.flac").write_bytes(b"fLaC" + bytes(100))
    (folder / "nothing.wav").write_bytes(b"")
    rows += [
        {"id": "nan", "audio": "nan.wav", "text": "x"},
        {"id": "empty", "audio": "empty.wav", "text": "x"},
        {"id": "broken", "audio": "broken.flac", "text": "x"},
        {"id": "nothing", "audio": "nothing.wav", "text": "x"},
        {"id": "gone", "audio": "gone.wav", "text": "x"},
        {"id": "textless", "audio": "stereo.wav"},
        {"id": "stereo", "audio": "stereo.wav", "text": "same id"},
        {"id": "beyond", "audio": "stereo.wav", "text": "x", "offset": 5},
    ]
    manifest = folder / "manifest.jsonl"
    manifest.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows) + "not json\n")
    return manifest


REASONS = {
    "nan": "not_finite",
    "empty": "zero_length",
    "broken": "undecodable",
    "nothing": "zero_length",
    "gone": "missing_file",
    "textless": "no_text",
    "stereo": "duplicate_id",
    "beyond": "zero_length",
    "manifest.jsonl:22": "bad_json",
}
