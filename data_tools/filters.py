"""Quality before quantity: what is packed and what is refused, each refusal under a fixed word that is
counted.

`SampleFilter.judge` works on metadata, while planning; `SampleFilter.judge_clip` again on the decoded
clip, since corpora err about durations and many have none.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import os
from dataclasses import dataclass, field
from functools import lru_cache
from typing import ClassVar

from core.audio import EXTENSIONS, REFUSABLE
from core.ctc_text import ctc_target_ids
from core.languages import language_code
from core.samples import ANSWERED_BY_TEXT
from core.text import error_rate
from data_tools.corpora import Entry, Rejection
from data_tools.normalise import NORMALISERS, label_sentence
from data_tools.sources import kind_of

# Reasons of samples that somebody chose to leave out. Any other reason means that something is broken.
FILTERS = frozenset(
    (
        "too_short",
        "too_long",
        "too_slow",
        "too_fast",
        "language",
        "ctc_infeasible",
        "wer",
        "no_hypothesis",
        "duplicate_audio",
        "no_sound_hash",
        "no_speech",
        "pipe",
        "unmatched",
        *REFUSABLE,
    )
)


@dataclass(slots=True)
class SplitKey:
    """What keeps samples on one side of a split: of which kind it is, and its value."""

    NAMES: ClassVar[dict[str, str]] = {"speaker": "speakers", "recording": "recordings", "id": "samples"}

    by: str
    value: str


@dataclass
class Filters:
    """Bounds that a sample must keep; None: not asked for. Seconds, characters a second, shares."""

    min_seconds: float | None = None
    max_seconds: float | None = None
    min_rate: float | None = None  # characters of text a second
    max_rate: float | None = None
    langs: list[str] | None = None
    max_wer: float | None = None  # of the entry's hypothesis against its text, by core.text.error_rate
    ctc_frame_rate: float | None = None  # CTC frames a second: 25 for Whisper with two frames stacked
    ctc_text: str = "lower"  # how training will write CTC targets (data.ctc_text)
    tokenizer: str | None = None  # folder of the LLM's tokenizer: counts tokens, and decides CTC feasibility
    drop_duplicates: bool = False  # by the entries' sound_hash

    @property
    def by_seconds(self) -> list[str]:
        """Options in use that need a clip's duration."""
        names = ("min_seconds", "max_seconds", "min_rate", "max_rate", "ctc_frame_rate")
        return [f"--{name.replace('_', '-')}" for name in names if getattr(self, name) is not None]


@dataclass
class SampleFilter:
    """Default task, normalised text, split, filters: what every entry passes through before it is planned."""

    filters: Filters = field(default_factory=Filters)
    normalise: str = "raw"
    splits: dict[str, float] = field(default_factory=dict)  # name -> share
    split_by: str = "speaker"
    take: str | None = None
    seed: int = 0
    allow_pipes: bool = False
    clearest_seconds: float | None = (
        None  # clips of task sound are cut to their clearest stretch of this length
    )
    _is_allowed: dict[str | None, bool] = field(
        default_factory=dict, repr=False
    )  # language -> whether filters.langs has it

    def judge(self, entry: Entry) -> Rejection | None:
        """None for an entry to pack (brought into order in place), else why not. OTHER_SPLIT is no fault,
        only not this one."""
        if fault := self.prepare(entry):
            return fault
        if self.take is not None and self.split_of(self.split_key(entry))[0] != self.take:
            return OTHER_SPLIT
        return self.judge_metadata(entry)

    def prepare(self, entry: Entry) -> Rejection | None:
        """Bring an entry into order; refuse what is incomplete, whatever split it falls into."""
        if fault := complete(entry, self.normalise):
            return fault
        return None if self.allow_pipes else piped(entry)

    def split_key(self, entry: Entry) -> SplitKey:
        """What must not be on both sides of a split; where that is not known, the next best: speaker,
        recording, id.

        The same whatever reader an entry comes from: bare names count, neither the corpus nor the folders
        that it is in.
        """
        if self.split_by == "speaker" and entry.speaker:
            return SplitKey("speaker", entry.speaker)
        if self.split_by != "id" and (recording := recording_of(entry)):
            return SplitKey("recording", recording)
        return SplitKey("id", entry.id if self.split_by == "id" else _bare(entry.id))

    def split_of(self, key: SplitKey) -> tuple[str, int]:
        """The split of a key, by its hash alone, so it is the same in every run, part and order; and that
        hash."""
        place = int.from_bytes(
            hashlib.blake2b(f"split:{self.seed}:{key.value}".encode(), digest_size=8).digest(), "big"
        )
        remainder, total = place / 2**64, sum(self.splits.values())
        for name, share in self.splits.items():
            remainder -= share / total
            if remainder < 0:
                return name, place
        return next(reversed(self.splits)), place

    def judge_metadata(self, entry: Entry) -> Rejection | None:
        """Filters that need no audio."""
        f = self.filters
        if f.langs and not self._allows_language(entry.lang):
            return Rejection(
                entry.id, "language", f"{entry.lang} is not one of {', '.join(f.langs)}", entry.corpus
            )
        if f.drop_duplicates and entry.audio and entry.sound_hash is None:
            return Rejection(
                entry.id,
                "no_sound_hash",
                "duplicates are found by sound_hash: run data_tools.annotate --hash first",
                entry.corpus,
            )
        if f.max_wer is not None and entry.task == "asr":
            if entry.hypothesis is None:
                return Rejection(
                    entry.id,
                    "no_hypothesis",
                    "no hypothesis to compare with: run data_tools.annotate --whisper first",
                    entry.corpus,
                )
            rate = error_rate(entry.text or "", entry.hypothesis, entry.lang)
            if rate > f.max_wer:
                return Rejection(
                    entry.id, "wer", f"{rate:.3f} of words differ from: {entry.hypothesis}", entry.corpus
                )
        if entry.audio is None or entry.duration is None:
            return None
        cut = self.clearest_seconds if self.clearest_seconds and entry.task == "sound" else math.inf
        return self.judge_clip(entry, min(entry.duration, cut))

    def _allows_language(self, lang: str | None) -> bool:
        if lang not in self._is_allowed:
            self._is_allowed[lang] = bool({lang, language_code(lang)} & set(self.filters.langs or ()))
        return self._is_allowed[lang]

    def judge_clip(self, entry: Entry, seconds: float) -> Rejection | None:
        f = self.filters

        def refuse(reason: str, detail: str) -> Rejection:
            return Rejection(entry.id, reason, detail, entry.corpus)

        if seconds <= 0:
            return refuse("zero_length", f"a stretch of {seconds} s")
        if f.min_seconds is not None and seconds < f.min_seconds:
            return refuse("too_short", f"{seconds:.3f} s")
        if f.max_seconds is not None and seconds > f.max_seconds:
            return refuse("too_long", f"{seconds:.3f} s")
        if not entry.text:
            return None
        rate = len(entry.text) / seconds
        if f.min_rate is not None and rate < f.min_rate:
            return refuse("too_slow", f"{rate:.2f} characters a second")
        if f.max_rate is not None and rate > f.max_rate:
            return refuse("too_fast", f"{rate:.2f} characters a second")
        if f.ctc_frame_rate is not None:
            frames, needed = (
                math.floor(seconds * f.ctc_frame_rate),
                ctc_frames_needed(self.token_ids(entry.text)),
            )
            if frames < needed:
                return refuse(
                    "ctc_infeasible",
                    f"{needed} frames needed (tokens + repeats), {frames} there at {f.ctc_frame_rate:g} a "
                    f"second",
                )
        return None

    def token_ids(self, text: str | None) -> list[int]:
        """The transcript as training will spell it for CTC; empty without a tokenizer."""
        if not self.filters.tokenizer or not text:
            return []
        return ctc_target_ids(load_tokenizer(self.filters.tokenizer), text, self.filters.ctc_text)


OTHER_SPLIT = Rejection("", "other_split")


def piped(entry: Entry) -> Rejection | None:
    """Why an entry whose audio is a shell command is not read unasked: it would run with the caller's
    rights."""
    if entry.audio is None or not entry.audio.startswith("pipe:"):
        return None
    return Rejection(
        entry.id,
        "pipe",
        f"a command in place of a file: --allow-pipes runs it ({entry.audio[5:]})",
        entry.corpus,
    )


def complete(entry: Entry, normalise: str = "raw") -> Rejection | None:
    """Give an entry its task, its text in the named form and a sound its sentence; refuse what has nothing to
    be learnt."""
    if entry.task is None:
        answered = entry.response is not None or entry.messages or entry.label is not None
        entry.task = "text" if entry.audio is None else "chat" if answered else "asr"
    if entry.offset is None and not entry.duration:
        entry.duration = None  # 0: unknown to the corpus; known once decoded
    if entry.audio is None and not entry.messages and not (entry.prompt and entry.response):
        return Rejection(
            entry.id,
            "no_audio",
            "neither audio nor a text-only sample (prompt and response, or messages)",
            entry.corpus,
        )
    if entry.task == "sound" and entry.label and entry.text is None:
        entry.text = label_sentence(entry.label)
    if entry.text is not None:
        entry.text = NORMALISERS[normalise](entry.text).strip() or None
    if entry.task == "asr" and entry.text is None:
        return Rejection(entry.id, "no_text", "task asr needs a transcript in text", entry.corpus)
    # A transcript is the answer to "transcribe"; given to another question it would be learnt as one, too.
    if not (
        entry.response or entry.messages or entry.label or (entry.text and entry.task in ANSWERED_BY_TEXT)
    ):
        is_wrong_case = entry.task.lower() in ANSWERED_BY_TEXT and entry.task != entry.task.lower()
        hint = f"; is {entry.task.lower()} meant?" if is_wrong_case else ""
        return Rejection(
            entry.id,
            "no_target",
            f"task {entry.task} needs a response, label or messages{hint}",
            entry.corpus,
        )
    return None


def ctc_frames_needed(ids: list[int]) -> int:
    """U + repeats: CTC must put a blank between two equal neighbours (Graves et al. 2006, section 3)."""
    return len(ids) + sum(a == b for a, b in itertools.pairwise(ids))


@lru_cache(maxsize=4)
def load_tokenizer(folder: str):
    """Loaded once, before workers are forked. Errors: OSError of transformers for a folder without a
    tokenizer."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def recording_of(entry: Entry) -> str | None:
    """What an entry was cut from: as the corpus says, else the file that it is in. The bare name, without
    folders and extension, so that it does not matter from where a corpus is read. None where it is not known,
    as for a tar's member."""
    name = entry.recording or ("" if kind_of(entry.audio or "")[0] != "file" else entry.audio)
    return _bare(name) if name else None


def _bare(name: str) -> str:
    base = name.rstrip("/").rpartition("/")[2]
    stem, dot, extension = base.rpartition(".")
    return stem if dot and stem and extension.lower() in EXTENSIONS else base
