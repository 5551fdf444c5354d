"""Print what a packed folder holds, draw its histograms, or write one of its clips.

    python -m data_tools.show DIR

    --histograms FILE        histograms of duration and of speaking rate
    --index ROW --out FILE   one clip (and its JSON, printed); ROW is a number, or CORPUS/ID
    --lhotse FILE            a lhotse cut manifest of the shards as they are (commands read the bytes from
                             the tars)

Everything but --index and --lhotse comes from the index alone: no shard is opened.
"""

from __future__ import annotations

import gzip
import json
import shlex
import signal
import sys
from pathlib import Path

import numpy as np
import soundfile

from core.audio import AudioError, read
from core.command_line import CommandParser, accept_old_name
from core.console import duration, plural, print_error, print_text, printable
from core.object_store import joined
from data_tools.output import WORK
from data_tools.progress import watched
from data_tools.shards import INDEX_NAME, ShardError, ShardIndex, id_hash

_BAR = 40


def histogram_text(values: np.ndarray, unit: str, bins: int = 12) -> str:
    """Rows of `low - high  share  bar`, up to the 99.5th percentile (the last row holds what lies above)."""
    if len(values) == 0:
        return "  none"
    edges = np.linspace(0.0, max(float(np.percentile(values, 99.5)), 1e-6), bins + 1)
    counts = np.histogram(np.minimum(values, edges[-1]), edges)[0]
    return "\n".join(
        f"  {edges[i]:7.1f} - {edges[i + 1]:7.1f} {unit}  {count / len(values):6.1%}  "
        f"{'#' * round(_BAR * count / counts.max())}"
        for i, count in enumerate(counts)
    )


def describe(folder: Path | str, index: ShardIndex) -> str:
    """The report: totals, a line for each task and language, and two histograms."""
    record, samples = json.loads((index.folder / INDEX_NAME).read_bytes()), index.samples
    megabytes = sum(shard["filesize"] for shard in index.shards) / 1e6
    lines = [
        f"{index.name}: {plural(len(index), 'sample')}, {duration(index.hours * 3600)} in "
        f"{plural(len(index.shards), 'shard')} of "
        f"{megabytes:,.1f} MB in all",
        f"fingerprint {index.fingerprint}",
        "",
        f"{'task':<14}{'language':<10}{'codec':<7}{'samples':>12}{'hours':>10}{'s mean':>8}{'s max':>8}"
        f"{'chars/s':>9}{'tokens/s':>9}",
    ]
    kinds = np.stack([samples["task"], samples["lang"], samples["codec"]], 1).astype(np.int64)
    for kind in np.unique(kinds, axis=0):
        rows = samples[(kinds == kind).all(1)]
        seconds = rows["duration"].astype(np.float64)
        total = seconds.sum()
        rate = f"{rows['characters'].sum() / total:.1f}" if total else "-"
        tokens = f"{rows['tokens'].sum() / total:.2f}" if total and rows["tokens"].any() else "-"
        lines.append(
            f"{index.tasks[kind[0]]:<14}{index.langs[kind[1]] or '?':<10}{index.codecs[kind[2]] or 'text':<7}{len(rows):>12,}"  # noqa: E501
            f"{total / 3600:>10.2f}{seconds.mean():>8.2f}{seconds.max():>8.2f}{rate:>9}{tokens:>9}"
        )
    seconds, rates = durations_and_rates(index)
    lines += [
        "",
        "duration",
        histogram_text(seconds, "s"),
        "",
        "characters a second",
        histogram_text(rates, "/s"),
    ]
    if record.get("rejected"):
        lines += ["", f"refused when packed (named in {joined(folder, 'rejected.jsonl')})"]
        lines += [
            f"  {count:>9,}  {duration(record.get('rejected_hours', {}).get(reason, 0) * 3600):>10}  {reason}"
            for reason, count in record["rejected"].items()
        ]
    if record.get("ignored"):
        lines += [
            "",
            "ignored when packed",
            *(f"  {count:>9,}  {what}" for what, count in record["ignored"].items()),
        ]
    if record.get("findings"):
        lines += ["", f"noted when packed (named in {joined(folder, 'findings.jsonl')})"]
        lines += [f"  {count:>9,}  {kind}" for kind, count in record["findings"].items()]
    return printable("\n".join(lines))


def durations_and_rates(index: ShardIndex) -> tuple[np.ndarray, np.ndarray]:
    """Seconds of every clip, and characters a second of every clip with a transcript."""
    seconds, characters = index.samples["duration"], index.samples["characters"]
    spoken = (seconds > 0) & (characters > 0)
    return seconds[seconds > 0], characters[spoken] / seconds[spoken]


def draw(index: ShardIndex, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for axis, values, label in zip(
        axes, durations_and_rates(index), ("seconds a clip", "characters a second"), strict=True
    ):
        if len(values):
            axis.hist(np.minimum(values, np.percentile(values, 99.5)), bins=60)
        axis.set_xlabel(label)
        axis.set_ylabel("clips")
    figure.suptitle(f"{index.name}: {len(index):,} samples, {index.hours:,.2f} h")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def find_row(index: ShardIndex, name: str) -> int:
    """A row number, or CORPUS/ID. Errors: ShardError for one that is not there."""
    if name.isdigit():
        if int(name) >= len(index):
            raise ShardError(f"row {name}: {index.location} has {len(index)} samples, rows count from 0")
        return int(name)
    corpus, _, sample_id = name.partition("/")
    rows = np.flatnonzero(index.samples["id_hash"] == id_hash(corpus, sample_id))
    if len(rows) == 0:
        raise ShardError(
            f"{index.location} holds no sample {name}: give a row number, or CORPUS/ID as the JSON has them"
        )
    return int(rows[0])


def write_clip(index: ShardIndex, name: str, to: Path) -> str:
    """Write one clip to a file: its own bytes where the extension is the same, else decoded into the file's
    format."""
    row = find_row(index, name)
    audio, record = index.read(row)
    text = printable(json.dumps(record, ensure_ascii=False, indent=1))
    if audio is None:
        return f"{text}\nrow {row} is text alone"
    if to.suffix == f".{index.codecs[index.samples['codec'][row]]}":
        to.write_bytes(audio)
    else:
        try:
            decoded = read(audio, whole=False)
            soundfile.write(to, decoded.samples, decoded.rate)
        except AudioError as error:
            raise ShardError(f"row {row} cannot be decoded ({error.reason}): {error}") from None
        except (
            TypeError,
            ValueError,
            soundfile.LibsndfileError,
        ) as error:  # an extension that libsndfile does not know
            raise ShardError(f"cannot write {to}: {error}") from None
    return f"{text}\nrow {row} written to {to}"


def write_lhotse_cuts(index: ShardIndex, path: Path) -> int:
    """A lhotse cut manifest that leaves the shards as they are: each recording's source is the command that
    cuts its bytes out of the tar. lhotse runs it when the audio is loaded. Returns the number of cuts."""
    if index.is_remote:
        raise ShardError(
            f"{index.location}: lhotse reads local files: copy it first (data_tools.copy_packed)"
        )
    count = 0
    with gzip.open(path, "wt", encoding="utf-8") as out:
        for row, sample in enumerate(watched(index.samples, "cuts", total=len(index))):
            if not sample["audio_size"]:
                continue
            record = index.read(row)[1]
            tar = shlex.quote(str((index.folder / index.shards[sample["shard"]]["url"]).absolute()))
            source = f"tail -c +{int(sample['audio_offset']) + 1} {tar} | head -c {int(sample['audio_size'])}"
            name, rate, samples = (
                f"{record['corpus']}/{record['id']}",
                record["sample_rate"],
                round(record["duration"] * record["sample_rate"]),
            )
            recording = {
                "id": name,
                "sources": [{"type": "command", "channels": [0], "source": source}],
                "sampling_rate": rate,
                "num_samples": samples,
                "duration": samples / rate,
                "channel_ids": [0],
            }
            supervision = {
                "id": name,
                "recording_id": name,
                "start": 0.0,
                "duration": samples / rate,
                "channel": 0,
                "text": record["text"],
            }
            optional = {"language": record["lang"], "speaker": record.get("speaker")}
            supervision |= {key: value for key, value in optional.items() if value is not None}
            cut = {
                "id": name,
                "start": 0.0,
                "duration": samples / rate,
                "channel": 0,
                "supervisions": [supervision],
            }
            out.write(
                json.dumps({**cut, "recording": recording, "type": "MonoCut"}, ensure_ascii=False) + "\n"
            )
            count += 1
    return count


def folders_in(parent: Path) -> str:
    """A line for each packed folder in a folder. Errors: ShardError where there is none."""
    packed = sorted(
        {path.parent for pattern in ("*/", "*/*/") for path in parent.glob(f"{pattern}{INDEX_NAME}")}
    )
    unfinished = sorted(
        {path.parents[1] for pattern in ("*/", "*/*/") for path in parent.glob(f"{pattern}{WORK}/done")}
        - set(packed)
    )
    if not packed and not unfinished:
        raise ShardError(
            f"{parent} holds no {INDEX_NAME}, nor does a folder in it: give a folder that data_tools/pack.py "
            f"has finished"
        )
    lines = [f"{'samples':>12}{'audio':>12}  {'tasks':<24}{'languages':<16}folder"]
    for folder in packed:
        try:
            index = ShardIndex.load(folder)
        except ShardError as error:
            lines.append(f"{'damaged':>24}  {'':<40}{folder}: {error}")
            continue
        tasks, langs = ", ".join(index.tasks), ", ".join(lang or "?" for lang in index.langs)
        lines.append(
            f"{len(index):>12,}{duration(index.hours * 3600):>12}  {tasks[:23]:<24}{langs[:15]:<16}{folder}"
        )
    lines += [
        f"{'not finished':>24}  {'':<40}{folder}: run its command again, or --merge" for folder in unfinished
    ]
    return printable("\n".join(lines))


def main(argv: list[str] | None = None) -> int:
    parser = CommandParser(
        "python -m data_tools.show", __doc__, example="shards/train --histograms durations.png"
    )
    parser.add_argument("folder", help="a packed folder or its URL")
    parser.add_argument(
        "--histograms", type=Path, help="draw histograms of duration and speaking rate into this file"
    )
    accept_old_name(parser, "--png", "--histograms")
    parser.add_argument("--index", metavar="ROW", help="write this clip: a row's number, or CORPUS/ID")
    accept_old_name(parser, "--listen", "--index")
    parser.add_argument("--out", type=Path, default=Path("clip.wav"), help="the clip of --index")
    accept_old_name(parser, "--to", "--out")
    parser.add_argument("--lhotse", type=Path, help="write lhotse cuts (.jsonl.gz)")
    options = parser.parse_args(argv)
    try:
        if Path(options.folder).is_dir() and not (Path(options.folder) / INDEX_NAME).exists():
            print(folders_in(Path(options.folder)))
            return 0
        index = ShardIndex.load(options.folder)
        if options.index is not None:
            print_text(write_clip(index, options.index, options.out))
            return 0
        if options.lhotse:
            print(f"{write_lhotse_cuts(index, options.lhotse)} cuts in {options.lhotse}")
            return 0
        print_text(describe(options.folder, index))
        if options.histograms:
            draw(index, options.histograms)
            print(f"\nhistograms in {options.histograms}")
        return 0
    except ShardError as error:
        print_error("error:", error)
        return 2


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `show DIR | head` ends quietly
    sys.exit(main())
