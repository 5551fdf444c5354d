"""Transcribe packed clips with Whisper's own decoder, as the upper baseline.

    python -m evaluation.whisper_baseline --whisper DIR --shards DIR --task asr

The predictions file is that of evaluation.run: `python -m evaluation.compare` pairs the two utterance by
utterance. Whisper gets the language where the shards name one that it knows (it detects the others),
and each clip is padded to 30 s, as Whisper is used.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoTokenizer, WhisperForConditionalGeneration

from core.command_line import CommandParser
from core.distributed import disconnect, from_main, hard_exit
from core.languages import language_code
from data_tools.shards import ShardError, ShardIndex
from evaluation.predictions import PredictionError, PredictionFile, row_key
from evaluation.run import InputError, finish, prediction_row, shard_folder, start
from model.features import SAMPLE_RATE, WINDOW_SECONDS, log_mel
from model.pretrained import SourceError, fingerprint, reading
from model.stages import ALIGNMENT
from recipe.config import Corpus, RecipeError
from stream.reader import decode, read_with_retry
from stream.rejected import BrokenSample
from stream.validation import select

WINDOW = int(WINDOW_SECONDS * SAMPLE_RATE)


class Whisper:
    """A Whisper folder as a transcriber of waveforms."""

    def __init__(self, path: Path, device: torch.device):
        with reading(path, "Whisper model"):
            self.model = WhisperForConditionalGeneration.from_pretrained(path).eval()
            self.model.to(device)
            self.tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        self.languages = getattr(self.model.generation_config, "lang_to_id", None)

    def code_of(self, language: str | None) -> str | None:
        """Return this Whisper's code of a language; None where it does not know it, or knows one
        language only."""
        code = language_code(language)
        return code if self.languages and f"<|{code}|>" in self.languages else None

    @torch.inference_mode()
    def transcribe(self, waveforms: list[torch.Tensor], languages: list[str | None]) -> list[list[int]]:
        """waveforms [S] each at 16 kHz and at most 30 s -> token ids each, greedy. Clips whose language is
        given and clips whose language is detected go through the model by themselves: transformers takes a
        batch of the one kind or of the other."""
        codes = [self.code_of(language) for language in languages]
        answers: list[list[int]] = [[] for _ in waveforms]
        for is_given in (True, False):
            chosen = [i for i, code in enumerate(codes) if (code is not None) is is_given]
            if chosen:
                ids = self._transcribe([waveforms[i] for i in chosen], [codes[i] for i in chosen])
                for i, tokens in zip(chosen, ids, strict=True):
                    answers[i] = tokens
        return answers

    def _transcribe(self, waveforms: list[torch.Tensor], languages: list[str | None]) -> list[list[int]]:
        lengths = torch.tensor([len(waveform) for waveform in waveforms])
        padded = torch.nn.utils.rnn.pad_sequence(waveforms, batch_first=True)
        device = self.model.device
        mel, _ = log_mel(
            padded.to(device), lengths.to(device), self.model.config.num_mel_bins, pad_to_samples=WINDOW
        )
        options: dict[str, Any] = {"do_sample": False, "num_beams": 1}
        if self.languages:
            options["task"] = "transcribe"
            if languages[0] is not None:
                options["language"] = languages
        output = self.model.generate(
            mel.to(self.model.dtype),
            attention_mask=torch.ones(len(mel), mel.shape[-1], device=device),
            **options,
        )
        special = set(self.tokenizer.all_special_ids)
        return [[token for token in row if token not in special] for row in output.tolist()]


def read_batch(index: ShardIndex, rows: list[int]) -> tuple[list[dict], list[torch.Tensor], list[dict]]:
    """Samples, their waveforms, and what could not be read."""
    samples, waveforms, rejected = [], [], []
    for row in rows:
        name = f"sample {row}"  # until its JSON has been read
        try:
            audio, sample, _ = read_with_retry(index, row)
            name = sample["id"]
            findings: list[str] = []
            waveform = decode(audio or b"", findings=findings)
            sample |= {"findings": findings} if findings else {}
            if len(waveform) > WINDOW:
                raise BrokenSample(
                    f"{len(waveform) / SAMPLE_RATE:.1f} s: Whisper's decoder takes 30 s at once"
                )
        except BrokenSample as error:
            rejected.append({"id": name, "corpus": index.name, "why": str(error)})
            continue
        samples.append(sample)
        waveforms.append(waveform)
    return samples, waveforms, rejected


def main(arguments: list[str] | None = None) -> int:
    parser = CommandParser(
        "python -m evaluation.whisper_baseline",
        __doc__.splitlines()[0],
        example="--whisper openai/whisper-base --shards shards/test --out whisper.jsonl",
    )
    parser.add_argument("--whisper", type=Path, required=True, help="folder of a whole transformers Whisper")
    parser.add_argument("--shards", required=True, help="folder written by data_tools/pack.py")
    parser.add_argument("--split", help="sub-folder of --shards")
    parser.add_argument(
        "--task", nargs="+", default=["asr"], help="tasks whose transcripts to score (default: asr)"
    )
    parser.add_argument(
        "--limit", type=int, help="only this many utterances, evenly spaced, the same as evaluation.run's"
    )
    parser.add_argument("--batch", type=int, default=8, help="clips at a time (default: 8)")
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument("--out", type=Path, required=True, help="predictions file")
    parser.add_argument("--restart", action="store_true", help="throw away what --out already holds")
    options = parser.parse_args(arguments)
    place = start(options.device)
    error = file = None
    try:
        index = ShardIndex.load(shard_folder(options.shards, options.split))
        rows = select(index, 0, ALIGNMENT.name, Corpus(tasks=options.task), options.limit)["row"].tolist()
        if not (options.whisper / "generation_config.json").exists():
            raise InputError(
                f"{options.whisper} holds no generation_config.json: give a whole Whisper folder, with "
                f"decoder and "
                "tokenizer"
            )
        whisper = Whisper(options.whisper, place.device)
        settings = {
            "whisper": str(options.whisper),
            "weights": fingerprint(options.whisper),
            "shards": index.fingerprint,
            "tasks": sorted(options.task),
            "limit": options.limit,
        }
        file = PredictionFile(options.out, settings, place.rank, options.restart)
        if place.rank == 0:
            file.prepare()
    except (InputError, PredictionError, RecipeError, ShardError, SourceError) as problem:
        error = str(problem)
    if place.stop(error) or file is None:
        return 2
    done = from_main(file.done() if place.rank == 0 else set())
    mine = sorted(rows, key=lambda row: -float(index.samples[row]["duration"]))[
        place.rank :: place.world_size
    ]
    with tqdm(
        total=len(mine), desc=f"whisper {file.path.stem}", unit="utt", disable=place.rank != 0
    ) as progress:
        for first in range(0, len(mine), options.batch):
            samples, waveforms, rejected = read_batch(index, mine[first : first + options.batch])
            left = [i for i, sample in enumerate(samples) if row_key(sample) not in done]
            answers = []
            if left:
                began = time.perf_counter()
                tokens = whisper.transcribe(
                    [waveforms[i] for i in left], [samples[i].get("lang") for i in left]
                )
                wall = round((time.perf_counter() - began) / len(left), 4)
                for i, ids in zip(left, tokens, strict=True):
                    text = str(whisper.tokenizer.decode(ids))
                    answers.append(
                        prediction_row(samples[i], text, text, "ctc") | {"tokens": len(ids), "wall": wall}
                    )
            file.append(answers, rejected)
            progress.update(len(samples) + len(rejected))
    return 0 if finish(file, place) else 2


if __name__ == "__main__":
    code = main()
    disconnect()
    hard_exit(code)
