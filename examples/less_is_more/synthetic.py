"""Synthesise sentences with words that the recordings lack: WordNet's examples, spoken by flite.

    python -m examples.less_is_more.synthetic [--cache .cache/quickstart] [--hours 6]    (the study does it
    where a variant asks)

    CACHE/synthetic/packages/      Debian's wordnet-base, and flite with its libraries where the machine has
                                   none
    CACHE/synthetic/clips/         16 kHz WAV
    CACHE/synthetic/train.jsonl    the manifest; each row is of corpus "synthetic"

Two hours of recordings hold a few thousand kinds of words, and a CTC head over an LLM's vocabulary hardly
learns to write a token that it was shown once. The sentences are chosen for their words, in rounds: the k-th
round walks through all sentences and takes each that holds a common token shown fewer than k times so far,
until there is enough. Voice and speed vary by sentence.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import soundfile
from tqdm import tqdm

from core.command_line import CommandParser
from examples.quickstart.fetch import DEFAULT_CACHE, FetchError, Source, download, make_folder, unpack_deb
from examples.quickstart.manifests import draw, plain, targets, write
from examples.steps import digest, file_digest

FLITE = ("BSD-like, of Carnegie Mellon University", "Flite, by Alan W Black and others")
WORDNET = Source(
    "apt",
    "wordnet-base",
    "1:3.0-37",
    "wordnet-base_1%3a3.0-37_all.deb",
    6467132,
    "61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752",
    "sentences",
    "WordNet 3.0 license",
    "WordNet 3.0, Princeton University",
)
# For machines without a flite of their own, of one kind of processor.
SPEAKER = [
    Source(
        "apt",
        "flite",
        "2.2-5",
        "flite_2.2-5_amd64.deb",
        252784,
        "f4ce03470bf9974c2cb9cacd981e6be29339ef4c97cf994dd6fa3f90e6544db9",
        "the program",
        *FLITE,
    ),
    Source(
        "apt",
        "libflite1",
        "2.2-5",
        "libflite1_2.2-5_amd64.deb",
        12823776,
        "bfa8c591f1b47730b30b372ec38e02918a1c9795eada67684e1746390ad2f061",
        "voices",
        *FLITE,
    ),
    Source(
        "apt",
        "libasound2",
        "1.2.8-1+b1",
        "libasound2_1.2.8-1+b1_amd64.deb",
        361788,
        "44c77b076a7b11ae99712439022d822245b1994c435da564ebd320bb676faf4c",
        "a library that flite needs",
        "LGPL-2.1+",
        "the ALSA project",
    ),
]
CTC_TEXT = "lower_no_punctuation"  # as in the quick start's common.yaml
COMMON = 12000  # a BPE tokenizer's lower ids are its earlier merges, i.e. the more frequent pieces of words
VOICES = ("slt", "rms", "awb") * 3 + (
    "kal16",
)  # three made from recordings, and now and then one joined from diphones
FASTEST, SLOWEST = 0.8, 1.2  # flite's duration_stretch, drawn between them
REST, WORD = (
    0.4,
    0.36,
)  # a guess at a clip's seconds before it is spoken: of rest, of a word (3 % too long over 6 h)
SENTENCE = re.compile(r"[A-Za-z][A-Za-z' ,.!?;-]*")


def sentences(wordnet: Path) -> list[str]:
    """The examples of 3 to 14 words without digits, brackets or omissions, each once, in an order of their
    own. WORDNET: the folder with data.noun and so on, a synset a line, its examples in quotes behind the
    bar."""
    found: dict[str, str] = {}
    for kind in ("noun", "verb", "adj", "adv"):
        for line in (wordnet / f"data.{kind}").read_text(encoding="latin-1").splitlines():
            if line.startswith("  "):  # the licence
                continue
            for text in map(str.strip, re.findall(r'"([^"]+)"', line.partition("|")[2])):
                if SENTENCE.fullmatch(text) and "..." not in text and 3 <= len(text.split()) <= 14:
                    found.setdefault(text.lower(), text.replace("--", ", ").replace("-", " "))
    return sorted(found.values(), key=lambda text: draw("wn", text))


def choose(
    texts: list[str], tokens_of: Callable[[str], list[int]], shown: Iterable[int], seconds: float
) -> list[str]:
    """About `seconds` of speech out of the texts. tokens_of: a text's CTC targets; shown: those of the
    recordings.
    Errors: FetchError where the texts do not last so long."""
    counts, tokens = (
        Counter(shown),
        {text: [token for token in tokens_of(text) if token < COMMON] for text in texts},
    )
    chosen: list[str] = []
    left, spoken, wanted = [text for text in texts if tokens[text]], 0.0, 0
    while spoken < seconds:
        wanted, passed = wanted + 1, []
        if not left:
            raise FetchError(
                f"the sentences make {spoken / 3600:.1f} h of speech, not {seconds / 3600:.1f}: ask for less"
            )
        for text in left:
            if spoken < seconds and any(counts[token] < wanted for token in tokens[text]):
                chosen.append(text)
                counts.update(tokens[text])
                spoken += REST + WORD * len(text.split())
            else:
                passed.append(text)
        left = passed
    return chosen


@dataclass(frozen=True)
class Flite:
    """The program, and where its libraries lie (None: the system's)."""

    program: str
    libraries: Path | None = None

    def speak(self, text: str, voice: str, stretch: float, out: Path) -> None:
        """One mono WAV. Errors: FetchError."""
        environment = {**os.environ, **({"LD_LIBRARY_PATH": str(self.libraries)} if self.libraries else {})}
        command = [
            self.program,
            "-voice",
            voice,
            "--setf",
            f"duration_stretch={stretch:.2f}",
            "-t",
            text,
            "-o",
            str(out),
        ]
        done = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
        if done.returncode or not out.exists():
            why = (done.stderr.strip() or "no message").splitlines()[-1]
            raise FetchError(
                f"flite refused '{text}' (exit {done.returncode}): {why}; does {self.program} -lv list "
                f"{voice}?"
            )


def speak(texts: list[str], flite: Flite, out: Path) -> list[dict]:
    """Clips under OUT, and their rows: id, audio, text, lang, duration (seconds), speaker, corpus, task."""

    def row(numbered: tuple[int, str]) -> dict:
        number, text = numbered
        voice, path = VOICES[int(draw("voice", text) * len(VOICES))], out / f"{number:05d}.wav"
        flite.speak(text, voice, FASTEST + (SLOWEST - FASTEST) * draw("rate", text), path)
        return {
            "id": f"synthetic-{number:05d}",
            "audio": path.name,
            "text": text,
            "lang": "en",
            "task": "asr",
            "corpus": "synthetic",
            "duration": round(soundfile.info(path).duration, 3),
            "speaker": f"flite-{voice}",
        }

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(tqdm(pool.map(row, enumerate(texts)), total=len(texts), desc="speak", unit="clip"))


def packages(cache: Path) -> tuple[Path, Flite]:
    """WordNet's folder, and what speaks: the machine's own flite, else an unpacked one. Errors:
    FetchError."""
    own, out = shutil.which("flite"), cache / "synthetic" / "packages"
    if own is None and platform.machine() != "x86_64":
        raise FetchError(
            f"flite is not there, and its package for {platform.machine()} was not tried: apt-get install "
            f"flite"
        )
    needed = [WORDNET] + ([] if own else SPEAKER)
    files = [download(source, cache / "downloads") for source in needed]
    make_folder(
        out,
        json.dumps([source.sha256 for source in needed]),
        lambda folder: [unpack_deb(file, folder) for file in files],
    )
    libraries = next(iter(out.glob("usr/lib/*/libflite.so.1")), None)
    return out / "usr/share/wordnet", Flite(own) if own else Flite(
        str(out / "usr/bin/flite"), libraries and libraries.parent
    )


def build(cache: Path, hours: float) -> Path:
    """Packages, clips, manifest; what is there already is not made again. CACHE holds the quick start's
    models and manifests. No sentence that a valid or test split asks for is spoken. Errors: FetchError."""
    from transformers import AutoTokenizer

    from core.ctc_text import ctc_target_ids

    def rows_of(path: Path) -> list[dict]:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

    def tokens_of(text: str) -> list[int]:
        return ctc_target_ids(tokenizer, text, CTC_TEXT)

    def make(folder: Path) -> None:
        rows = speak(choose(allowed, tokens_of, shown, 3600 * hours), flite, folder)
        write(folder / "rows.jsonl", rows)

    wordnet, flite = packages(cache)
    tokenizer = AutoTokenizer.from_pretrained(cache / "models" / "smollm2-135m", trust_remote_code=False)
    manifests = cache / "manifests"
    held_out = [path for path in manifests.glob("*.jsonl") if not path.stem.endswith("-train")]
    known = set().union(*(targets(row) for path in held_out for row in rows_of(path)))
    allowed = [text for text in sentences(wordnet) if plain(text) not in known]
    shown = [
        token for row in rows_of(manifests / "dialogues-train.jsonl") for token in tokens_of(row["text"])
    ]
    clips = cache / "synthetic" / "clips"
    make_folder(clips, digest(hours, file_digest(Path(__file__)), allowed, shown), make)
    manifest = cache / "synthetic" / "train.jsonl"
    write(
        manifest,
        ({**row, "audio": str((clips / row["audio"]).resolve())} for row in rows_of(clips / "rows.jsonl")),
    )
    return manifest


def main() -> int:
    parser = CommandParser("python -m examples.less_is_more.synthetic", __doc__.split("\n")[0], example="")
    parser.add_argument(
        "--cache",
        type=Path,
        default=DEFAULT_CACHE,
        help=f"the quick start's folder (default: {DEFAULT_CACHE})",
    )
    parser.add_argument("--hours", type=float, default=6.0, help="of speech, about (default: 6)")
    options = parser.parse_args()
    try:
        print(f"manifest: {build(options.cache, options.hours)}")
    except (FetchError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
