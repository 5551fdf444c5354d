"""A model folder as an object that transcribes recordings of any length and answers questions about clips.

sources -> blocks at 16 kHz -> windows (soundwave/windows.py) -> batches by padded seconds
    -> encoder, CTC head -> gate: is there speech? -> decode -> word times -> one Transcription a source

Recordings of several windows pass encoder and CTC head once, in the scan that finds the windows' borders.
"""

from __future__ import annotations

import math
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, TypeAlias, cast

import numpy as np
import torch

from core.audio import (
    SAMPLE_RATE,
    AudioError,
    Finding,
    Recording,
    Resampler,
    is_silent,
    largest_decoded,
    mixed_block,
)
from core.audio import decode as decode_audio
from core.samples import INSTRUCTIONS, asked
from core.spelling import join_words, spell
from model import artifact
from model.batch import Batch
from model.encoder import Encoder
from model.generation import timestamps
from model.generation.drafted import Drafting, refusal
from model.generation.hotwords import BONUS, Hotwords
from model.generation.joint import JointSearch
from model.generation.timestamps import Word, align_frames, frame_seconds
from model.pretrained import device_of
from model.soundwave import Audio, Soundwave
from model.waveforms import SoundWarning, mono
from soundwave.decoding import DECODES, Decode, Decoding, ctc_frames, decode_batch, rows_of
from soundwave.results import Answer, Segment, Transcription
from soundwave.windows import CONTEXT_SECONDS, Cutter, Frames, Window

Source: TypeAlias = "str | os.PathLike | bytes | np.ndarray | torch.Tensor | Sequence[float]"
#: A window has speech if the CTC head finds a token in it, or in any frame at least this probability of one.
#: Beyond GATE_SECONDS more, in proportion to the length, up to twice as much: the largest of many frames is
#: large by chance. Chosen on the quick start's validation dialogues and on noise (docs/transcribe.md).
GATE = 0.25
GATE_SECONDS = 3.0
WINDOW_SECONDS = 10.0
# Shorter pauses are inside sentences too, where the CTC head misses words: from 0.6 s, 46 clips became 91
# windows, and the WER rose from 58 % to 91 % (benchmarks/long_audio.py, 2.5 min of the quick start's tests).
PAUSE_SECONDS = 2.0
BLOCK_SECONDS = 30.0  # of audio that is read at a time
PROMPT_POSITIONS = 256  # more than a window of WINDOW_SECONDS and its prompt take of the LLM's context
POOL_BATCHES = 4  # batches of windows that are sorted by length together
SPEAKERS = "channel {}"


@dataclass(frozen=True)
class Options:
    """How to transcribe.

    decode: None: ctc for a model of stage 1, joint with hotwords, else greedy's tokens: drafted in fp32,
    if the LLM's cache allows it. timestamps: "word" for times of words. hotwords: words or phrases that joint
    search favours, each token by
    hotword_bonus; hotwords_in_prompt: name them in the prompt, too. language: of the speech, decides what
    a word is. channels: mix them, or "split": transcribe each by itself, as a speaker. window_seconds:
    the longest stretch that is transcribed at once; None: 10 s, or what the model takes. pause_seconds:
    without a token that end a window; 0: only its length does. overlap_seconds: that neighbours see of
    each other. batch_seconds: padded audio in a batch. gate: probability of a token below which a window
    without tokens is silence; 0 lets all through. beams, ctc_weight, token_bonus: of joint search.
    """

    decode: Decode | None = None
    timestamps: Literal["word"] | None = None
    hotwords: Sequence[str] = ()
    hotword_bonus: float = BONUS
    hotwords_in_prompt: bool = False
    language: str | None = None
    channels: Literal["mix", "split"] = "mix"
    batch_seconds: float = 120.0
    window_seconds: float | None = None
    pause_seconds: float = PAUSE_SECONDS
    overlap_seconds: float = 0.0
    gate: float = GATE
    max_new_tokens: int = 200
    beams: int = JointSearch.beams
    ctc_weight: float = JointSearch.weight
    token_bonus: float = JointSearch.token_bonus

    def __post_init__(self) -> None:
        choices = {
            "decode": (None, *DECODES),
            "timestamps": (None, "word"),
            "channels": ("mix", "split"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                names = ", ".join(str(value) for value in allowed)
                raise ValueError(f"{name} is {getattr(self, name)!r}: give one of {names}")
        least = {
            "batch_seconds": 1.0,
            "pause_seconds": 0.0,
            "overlap_seconds": 0.0,
            "gate": 0.0,
            "hotword_bonus": 0.0,
        }
        if self.window_seconds is not None:
            least["window_seconds"] = 1.0
        for name, value in least.items():
            given = getattr(self, name)
            if isinstance(given, bool) or not isinstance(given, (int, float)) or not given >= value:
                raise ValueError(f"{name} is {given!r}: give a number, at least {value:g}")
        if isinstance(self.hotwords, str):
            raise ValueError(f"hotwords is the text '{self.hotwords[:40]}': give a list of words or phrases")
        if self.hotwords and self.decode not in (None, "joint") and not self.hotwords_in_prompt:
            raise ValueError(
                f"hotwords bias joint search, and decode is '{self.decode}': give decode='joint'"
            )
        if self.hotwords_in_prompt and self.decode == "ctc":
            raise ValueError("hotwords_in_prompt with decode='ctc': the CTC head reads no prompt")


#: Called with the seconds of audio that were transcribed so far.
Progress = Callable[[float], None]


@dataclass
class _Piece:
    """A window on its way through a batch."""

    job: _Job
    channel: int
    window: Window


@dataclass
class _Job:
    """A source whose windows are transcribed."""

    number: int
    channels: int = 1
    samples: int = 0  # of one channel, at 16 kHz
    waiting: int = 0  # windows that were cut and not transcribed
    is_read: bool = False
    error: Exception | None = None
    unanswered: str | None = None
    notes: dict[str, None] = field(default_factory=dict)
    segments: list[tuple[int, int, Segment]] = field(default_factory=list)  # (body's start, channel, ...)
    skipped: int = 0  # samples without speech


@dataclass(frozen=True)
class _Setup:
    """What is the same for all windows of a call."""

    options: Options
    decoding: Decoding
    instruction: str
    longest: int  # samples of a window's body
    overlap: int
    pause: int


def load(
    folder: str | Path,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    encoder: str | None = None,
    llm: str | None = None,
    with_llm: bool = True,
) -> SpeechModel:
    """Load a model folder (`<output>/<stage>/model`).

    device: None: a GPU where there is one. dtype: of the frozen parts; None: the one that the folder names.
    encoder, llm: folders of the frozen parts, where they are not where the model folder names them. with_llm:
    False loads the CTC head alone, for decode="ctc". Errors: FolderError, SourceError.
    """
    place = device_of(device)
    return SpeechModel(
        artifact.load(folder, encoder=encoder, llm=llm, device=place, dtype=dtype, with_llm=with_llm)
    )


class SpeechModel:
    """Transcribes and answers with a `Soundwave` network (`network`)."""

    def __init__(self, network: Soundwave):
        self.network = network.eval()
        self._begins_word: torch.Tensor | None = None

    @property
    def has_llm(self) -> bool:
        return self.network.llm is not None

    # ---- what users call ----

    def transcribe(
        self, source: Source, *, sampling_rate: int = SAMPLE_RATE, progress: Progress | None = None, **options
    ) -> Transcription:
        """Return what is said in a recording of any length.

        source: a file's path, the bytes of one, or samples as a tensor or array (see
        `model.waveforms.mono`) at `sampling_rate`. options: those of `Options`. Errors: AudioError and
        ValueError, one line each.
        """
        results = self.transcribe_all(
            [source], sampling_rate=sampling_rate, progress=progress, options=Options(**options)
        )
        result = next(iter(results))
        with _named(source):
            if isinstance(result, Exception):
                raise result
        return result

    def transcribe_all(
        self,
        sources: Iterable[Source],
        *,
        sampling_rate: int = SAMPLE_RATE,
        progress: Progress | None = None,
        options: Options | None = None,
    ) -> Iterator[Transcription | Exception]:
        """Yield the transcription of each source, in order; windows of all sources share batches.

        For a source that cannot be used its error is yielded (AudioError, ValueError). Errors: ValueError for
        options that this model cannot fulfil.
        """
        setup = self._setup(options or Options())
        return self._transcribe_all(sources, sampling_rate, progress, setup)

    def transcribe_clip(
        self, source: Source, *, sampling_rate: int = SAMPLE_RATE, **options
    ) -> Transcription:
        """Return what is said in a clip, transcribed at once: `transcribe` without windows, for clips
        that the model takes whole. Errors: as of `transcribe`, AudioError for a longer one."""
        with _named(source):
            waveform, findings = self._clip(source, sampling_rate)
        longest = self.network.config.encoder.max_seconds
        transcription = self.transcribe(waveform, **{"window_seconds": longest} | options)
        return replace(transcription, notes=(*map(_finding_text, findings), *transcription.notes))

    def answer(
        self,
        source: Source,
        question: str,
        *,
        sampling_rate: int = SAMPLE_RATE,
        max_new_tokens: int = 200,
        decode: Literal["greedy", "drafted"] = "greedy",
    ) -> Answer:
        """Return the LLM's answer to a question about a clip. source: as of `transcribe`, of at most
        `model.encoder.max_seconds`. Errors: AudioError, ValueError, PromptError."""
        if not self.has_llm:
            raise ValueError("this model has no LLM to ask: load the folder of a later stage, with its LLM")
        if decode not in ("greedy", "drafted"):
            raise ValueError(f"decode is {decode!r}: an answer to a question is greedy or drafted")
        token = self.network.config.audio_token
        if token in question:
            raise ValueError(f"the question holds {token}: leave it out, the audio stands before it")
        with _named(source):
            waveform, findings = self._clip(source, sampling_rate)
        with _collected() as messages:
            text = self.network.answer(
                [[asked(question, token)]],
                [waveform],
                max_new_tokens=max_new_tokens,
                drafted=Drafting() if decode == "drafted" else None,
            )[0]
        notes = [_finding_text(finding) for finding in findings]
        notes += [message.removeprefix("waveform 0 ") for message in messages]
        return Answer(" ".join(text.split()), len(waveform) / SAMPLE_RATE, tuple(notes))

    # ---- settings ----

    def _setup(self, options: Options) -> _Setup:
        network = self.network
        decode = options.decode or self._default_decode(options)
        if options.hotwords and not self.has_llm:
            raise ValueError(
                "hotwords need the LLM, and this model has none (stage 1): leave them out, or load the "
                "folder of a later stage"
            )
        if decode != "ctc" and not self.has_llm:
            raise ValueError(
                f"decode is '{decode}', and this model has no LLM (stage 1): give decode='ctc', or load the "
                f"folder of a later stage"
            )
        instruction, joint = INSTRUCTIONS["asr"], None
        if options.hotwords and options.hotwords_in_prompt:
            instruction += f" Words that may occur: {', '.join(options.hotwords)}."
        if decode == "joint":
            hotwords = None
            if options.hotwords:
                hotwords = Hotwords(
                    network.tokenizer, options.hotwords, network.ctc_text, options.hotword_bonus
                )
            joint = JointSearch(
                options.ctc_weight,
                options.beams,
                token_bonus=options.token_bonus,
                ctc_text=network.ctc_text,
                hotwords=hotwords,
            )
        most = network.config.encoder.max_seconds - 2 * options.overlap_seconds
        seconds = options.window_seconds
        if seconds is None:
            seconds = min(WINDOW_SECONDS, network.trained_seconds or math.inf, most)
        if seconds > most or seconds <= 0:
            raise ValueError(
                f"window_seconds = {seconds:g} with overlap_seconds = {options.overlap_seconds:g} is more "
                f"than this model takes: {network.config.encoder.max_seconds:g} s (model.encoder.max_seconds)"
            )
        return _Setup(
            options,
            Decoding(decode, options.max_new_tokens, joint),
            instruction,
            round(seconds * SAMPLE_RATE),
            round(options.overlap_seconds * SAMPLE_RATE),
            round(options.pause_seconds * SAMPLE_RATE),
        )

    def _default_decode(self, options: Options) -> Decode:
        """Drafted rather than greedy where both write the same tokens."""
        if options.hotwords and not options.hotwords_in_prompt:
            return "joint"
        llm = self.network.llm
        if llm is None:
            return "ctc"
        same_tokens = next(llm.parameters()).dtype == torch.float32
        can_draft = refusal(llm, PROMPT_POSITIONS + options.max_new_tokens, Drafting.longest) is None
        return "drafted" if same_tokens and can_draft else "greedy"

    # ---- reading ----

    def _clip(self, source: Source, sampling_rate: int) -> tuple[torch.Tensor, list[Finding]]:
        """A source as one waveform [S] at 16 kHz, no longer than the model takes."""
        longest = self.network.config.encoder.max_seconds
        if not isinstance(source, (str, os.PathLike, bytes)):
            waveform, details = mono(source, sampling_rate)
            findings = [Finding("antiphase", detail) for detail in details]
            if len(waveform) > longest * SAMPLE_RATE:
                raise AudioError("too_long", _too_long(len(waveform) / SAMPLE_RATE, longest))
            return waveform, findings
        try:
            audio = decode_audio(source, whole=False, max_seconds=longest, max_bytes=largest_decoded(longest))
        except AudioError as error:
            if error.reason == "too_long":
                raise AudioError("too_long", _too_long(error.seconds or longest, longest)) from None
            raise
        return torch.from_numpy(audio.samples), list(audio.findings)

    def _blocks(self, source: Source, sampling_rate: int, split: bool, job: _Job) -> Iterator[np.ndarray]:
        """The samples of a source at 16 kHz, in blocks [frames, channels]; findings become the job's
        notes."""
        if not isinstance(source, (str, os.PathLike, bytes)):
            yield self._array(source, sampling_rate, split, job)
            return
        resampler = None
        for block in Recording(source).blocks(BLOCK_SECONDS):
            job.notes.update((_finding_text(finding), None) for finding in block.findings)
            samples = block.samples
            if not split:
                samples, findings = mixed_block(samples)
                job.notes.update((_finding_text(finding), None) for finding in findings)
            if resampler is None:
                resampler = Resampler(block.rate, SAMPLE_RATE, samples.shape[1])
            yield resampler.push(samples)
        if resampler is not None:  # there is a block at least, or an AudioError
            rest = resampler.push(np.zeros((0, job.channels), np.float32), last=True)
            if len(rest):
                yield rest

    @staticmethod
    def _array(source: Source, sampling_rate: int, split: bool, job: _Job) -> np.ndarray:
        samples = source.detach().cpu().float().numpy() if isinstance(source, torch.Tensor) else source
        samples = np.asarray(samples)
        if isinstance(source, torch.Tensor) and not source.is_floating_point():
            samples = source.detach().cpu().numpy()
        if split and samples.ndim == 2:
            by_channel = samples if samples.shape[0] < samples.shape[1] else samples.T
            return np.stack([mono(one, sampling_rate)[0].numpy() for one in by_channel], axis=1)
        waveform, details = mono(samples, sampling_rate)
        job.notes.update((_finding_text(Finding("antiphase", detail)), None) for detail in details)
        return waveform.numpy()[:, None]

    # ---- windows and batches ----

    def _transcribe_all(
        self, sources: Iterable[Source], sampling_rate: int, progress: Progress | None, setup: _Setup
    ) -> Iterator[Transcription | Exception]:
        pool: list[_Piece] = []
        jobs: list[_Job] = []
        done = [0.0]

        def work(least: float) -> None:
            """Transcribe the pool where it holds at least so many seconds."""
            seconds = sum(piece.window.seconds for piece in pool)
            if not pool or seconds < least:
                return
            for batch in batches(pool, setup.options.batch_seconds):
                self._decode(batch, setup)
                done[0] += sum(p.window.body_end - p.window.body_start for p in batch) / SAMPLE_RATE
                if progress is not None:
                    progress(done[0])
            pool.clear()

        for number, source in enumerate(sources):
            jobs.append(_Job(number))
            job = jobs[-1]
            pieces = self._pieces(source, sampling_rate, setup, job)
            while True:
                try:
                    piece = next(pieces, None)
                except ValueError as error:  # of this source; AudioError among them
                    job.error = error
                    break
                if piece is None:
                    break
                job.waiting += 1
                pool.append(piece)
                work(POOL_BATCHES * setup.options.batch_seconds)
            job.is_read = True
            while jobs and jobs[0].is_read and not jobs[0].waiting:
                yield _result(jobs.pop(0), setup.options)
        work(0.0)
        for job in jobs:
            yield _result(job, setup.options)

    def _pieces(self, source: Source, sampling_rate: int, setup: _Setup, job: _Job) -> Iterator[_Piece]:
        """The windows of a source, in the order in which they are complete."""
        cutters: list[Cutter] = []
        frame = round(frame_seconds(self.network) * SAMPLE_RATE)
        for block in self._blocks(source, sampling_rate, setup.options.channels == "split", job):
            if not cutters:
                job.channels = block.shape[1]
                batch_samples = round(setup.options.batch_seconds * SAMPLE_RATE)
                chunk = self._chunk(setup.longest)
                cutters = [
                    Cutter(self._scan, frame, setup.longest, setup.overlap, setup.pause, batch_samples, chunk)
                    for _ in range(job.channels)
                ]
            job.samples += len(block)
            for channel, cutter in enumerate(cutters):
                for window in cutter.push(np.ascontiguousarray(block[:, channel])):
                    yield _Piece(job, channel, window)
        for channel, cutter in enumerate(cutters):
            for window in cutter.finish():
                yield _Piece(job, channel, window)

    def _chunk(self, longest: int) -> int:
        """Samples that are scanned as one chunk, context included; longest: of a window."""
        encoder = cast(Encoder, self.network.encoder)
        if encoder.pad_to_samples:  # the encoder takes as long for a shorter one
            return encoder.pad_to_samples
        most = min(encoder.window_seconds or math.inf, encoder.max_seconds) * SAMPLE_RATE
        return int(min(longest + 2 * CONTEXT_SECONDS * SAMPLE_RATE, most))

    @torch.inference_mode()
    def _scan(self, chunks: list[np.ndarray]) -> list[Frames]:
        """Return the CTC head's output for chunks of a recording, which are encoded together."""
        hidden, lengths = timestamps.frames(self.network, [torch.from_numpy(chunk) for chunk in chunks])
        _, argmax, peak, blank_logprob = self.network.ctc_head(hidden, lengths)
        blank = self.network.ctc_head.blank
        begins = self._word_beginnings()
        # With ctc_length: full the model was trained with the frames of the silence that fills up a clip.
        reused = self.network.config.alignment.ctc_length != "full"
        frames = []
        for row, length in enumerate(lengths.tolist()):
            tokens = argmax[row, :length].cpu()
            is_blank = tokens == blank
            starts = begins[tokens.clamp(max=len(begins) - 1)] | is_blank
            outputs = [part[row, :length] for part in (hidden, argmax, peak, blank_logprob)]
            frames.append(Frames(is_blank.numpy(), starts.numpy(), tuple(outputs) if reused else ()))
        return frames

    def _word_beginnings(self) -> torch.Tensor:
        """Of each token, whether a word begins with it, or may; all, where the vocabulary does not tell."""
        if self._begins_word is None:
            tokenizer = self.network.tokenizer
            names = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
            begins = torch.tensor([str(name)[:1] in ("\u2581", "\u0120") for name in names])
            share = float(begins.float().mean())
            # Scripts without spaces, and vocabularies of characters: a word may begin anywhere.
            self._begins_word = begins if share > 0.1 else torch.ones(len(names), dtype=torch.bool)
        return self._begins_word

    def _encoded(self, clips: Sequence[np.ndarray | Window], instruction: str) -> tuple[Batch, Audio]:
        """Clips as a batch of prompts, and its `encode_audio`. Windows whose frames were scanned are not
        encoded again."""
        network = self.network
        chat = [asked(instruction, network.config.audio_token)]
        samples = [clip.samples if isinstance(clip, Window) else clip for clip in clips]
        batch = network.prompts([chat] * len(clips), [torch.from_numpy(one) for one in samples])
        scanned = {
            row: clip.outputs for row, clip in enumerate(clips) if isinstance(clip, Window) and clip.outputs
        }
        return batch, network.encode_audio(batch, frames=ctc_frames(network, batch, scanned))

    @torch.inference_mode()
    def _decode(self, pieces: list[_Piece], setup: _Setup) -> None:
        """Transcribe windows as one batch; the results go to their jobs."""
        with _collected() as messages:
            batch, audio = self._encoded([piece.window for piece in pieces], setup.instruction)
        _keep_notes(messages, pieces)
        gate = setup.options.gate
        spoken = [
            row
            for row, piece in enumerate(pieces)
            if not gate or not is_silent(piece.window.samples) and self._has_speech(audio, row, gate)
        ]
        for row, piece in enumerate(pieces):
            piece.job.waiting -= 1
            if row not in spoken:
                piece.job.skipped += piece.window.body_end - piece.window.body_start
        if not spoken:
            return
        batch, audio = rows_of(batch, spoken), rows_of(audio, spoken)
        pieces = [pieces[row] for row in spoken]
        with _collected() as messages:
            decoded = decode_batch(self.network, batch, setup.decoding, audio, token_limits(audio))
        _keep_notes([one for one in messages if not one.startswith("conversation ")], pieces)
        texts = [" ".join(one.text.split()) for one in decoded]
        words = self._words(audio, pieces, texts, setup)
        for row, (piece, one) in enumerate(zip(pieces, decoded, strict=True)):
            job = piece.job
            if one.unanswered is not None:
                job.unanswered = one.unanswered
                job.notes[f"a stretch has no text: {one.unanswered}"] = None
            segment = self._segment(piece, texts[row], words[row], audio, row)
            if segment is not None:
                job.segments.append((piece.window.body_start, piece.channel, segment))

    def _has_speech(self, audio: Audio, row: int, gate: float) -> bool:
        """Whether the CTC head finds a token in a window, or may."""
        length = int(audio.lengths[row])
        if bool((audio.argmax[row, :length] != self.network.ctc_head.blank).any()):
            return True
        longer = length * frame_seconds(self.network) / GATE_SECONDS
        gate = min(gate * min(max(longer, 1.0), 2.0), 1.0)
        return bool(1 - audio.blank_logprob[row, :length].min().exp() >= gate)

    def _words(self, audio: Audio, pieces: list[_Piece], texts: list[str], setup: _Setup) -> list[list[Word]]:
        """The words of each text with their times in the recording, of those whose middle is in the window's
        body; [] where no times are needed."""
        if setup.options.timestamps is None and not setup.overlap:
            return [[] for _ in pieces]
        network = self.network
        spellings = [
            spell(network.tokenizer, text, network.ctc_text, setup.options.language) for text in texts
        ]
        seconds = [piece.window.frames_seconds for piece in pieces]
        aligned = align_frames(network, audio.hidden, audio.lengths, spellings, seconds)
        words_of_pieces = []
        for piece, one in zip(pieces, aligned, strict=True):
            window = piece.window
            shift = window.frames_origin / SAMPLE_RATE
            own = []
            for word in one.words:
                moved = replace(
                    word,
                    start=round(word.start + shift, 3),
                    end=round(word.end + shift, 3),
                    confidence=round(word.confidence, 3),
                )
                middle = (moved.start + moved.end) / 2 * SAMPLE_RATE
                inside = window.body_start <= middle < window.body_end
                ends = window.body_end == window.start + len(window.samples) and middle >= window.body_end
                if not setup.overlap or inside or ends:
                    own.append(moved)
            words_of_pieces.append(own)
        return words_of_pieces

    def _segment(self, piece: _Piece, text: str, words: list[Word], audio: Audio, row: int) -> Segment | None:
        """A window's text as a segment; None where it has none."""
        window = piece.window
        if words:
            whole = len(words) == len(text.split())
            text = text if whole else join_words([word.text for word in words])
        elif window.body_start > window.start or window.body_end < window.start + len(window.samples):
            text = ""  # all its words are its neighbours'
        if not text:
            return None
        length, step = int(audio.lengths[row]), frame_seconds(self.network)
        peaks = (audio.argmax[row, :length] != self.network.ctc_head.blank).nonzero()[:, 0]
        if len(peaks):
            begin, end = float(peaks[0]) * step, float(peaks[-1] + 1) * step
            confidence = float(audio.peak[row, peaks].float().mean().exp())
        else:
            begin, end, confidence = 0.0, length * step, 0.0
        shift = window.frames_origin / SAMPLE_RATE
        lowest, highest = window.body_start / SAMPLE_RATE, window.body_end / SAMPLE_RATE
        begin, end = (min(max(place + shift, lowest), highest) for place in (begin, end))
        if words:
            begin, end = words[0].start, max(word.end for word in words)
        speaker = SPEAKERS.format(piece.channel + 1) if piece.job.channels > 1 else None
        return Segment(text, begin, end, confidence, tuple(words), speaker)


def token_limits(audio: Audio) -> list[int]:
    """Return of each clip how many tokens its transcript may have: a multiple of the CTC head's. An LLM that
    repeats itself would keep the whole batch waiting."""
    return [16 + 3 * kept for kept in audio.kept_lengths.tolist()]


def batches(pieces: Sequence[_Piece], seconds: float) -> Iterator[list[_Piece]]:
    """Pieces of similar length together, with at most so many padded seconds in a batch, longest first."""
    batch: list[_Piece] = []
    for piece in sorted(pieces, key=lambda piece: -piece.window.seconds):
        if batch and (len(batch) + 1) * batch[0].window.seconds > seconds:
            yield batch
            batch = []
        batch.append(piece)
    if batch:
        yield batch


def _result(job: _Job, options: Options) -> Transcription | Exception:
    if job.error is not None:
        return job.error
    if job.unanswered is not None and not job.segments:
        return ValueError(job.unanswered)
    if job.skipped and not job.segments:
        job.notes["no speech was found, so there is no text (gate; 0 transcribes it all the same)"] = None
    ordered = sorted(job.segments, key=lambda entry: (entry[2].start, entry[1], entry[0]))
    segments = tuple(segment for *_, segment in ordered)
    return Transcription(
        join_words([segment.text for segment in segments]),
        segments,
        job.samples / SAMPLE_RATE,
        options.language,
        tuple(job.notes),
        job.skipped / SAMPLE_RATE / job.channels,
    )


def _finding_text(finding: Finding) -> str:
    return f"{finding.detail} ({finding.kind})"


def _too_long(seconds: float, longest: float) -> str:
    return (
        f"lasts {seconds:.0f} s, this model takes {longest:g} s at most (model.encoder.max_seconds): cut it"
    )


@contextmanager
def _named(source: Source) -> Iterator[None]:
    """Name the file in errors about its audio."""
    try:
        yield
    except AudioError as error:
        if not isinstance(source, (str, os.PathLike)):
            raise
        raise AudioError(error.reason, f"{os.fspath(source)}: {error}", error.seconds) from None


@contextmanager
def _collected() -> Iterator[list[str]]:
    """The model's warnings about clips, as a list; other warnings are given as ever."""
    messages: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", SoundWarning)
        yield messages
    for warning in caught:
        if issubclass(warning.category, SoundWarning):
            messages.append(str(warning.message))
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def _keep_notes(messages: list[str], pieces: Sequence[_Piece]) -> None:
    """Give each message about a clip of a batch to its job, without the clip's number; others to all."""
    for message in messages:
        match = re.match(r"waveform (\d+) ", message)
        own = [pieces[int(match.group(1))]] if match else pieces
        for piece in own:
            piece.job.notes[message[match.end() :] if match else message] = None
