"""Measure the data stream against other loaders in one run.

    python -m benchmarks.stream [--manifest M.jsonl] [--hours 1] [--out FILE]

The same FLAC clips at 16 kHz, the same number of worker processes, one pass over everything, each way in a
process of its own, files in the page cache, torch on one thread. "Ready" is a padded batch of 80-bin log-mel
spectrograms in the main process.

    this project     planned batches, decoded and tokenised in workers, log-mel at true length where the model
                     would compute it
    webdataset       plain webdataset + soundfile + transformers' WhisperFeatureExtractor, batches of 8; pads
                     to 30 s, as it does by default, and once more with padding="longest"
    lhotse           Shar + DynamicBucketingSampler + on-the-fly features (Whisper's where librosa is there,
                     else Fbank)
    datasets         load_dataset("webdataset", streaming=True) + soundfile + WhisperFeatureExtractor,
                     padding="longest"

"per core" divides by the processor seconds that all processes used, which other work on the machine disturbs
little. Then the plan of `--utterances` in shards of 1,000: seconds, processor seconds and peak memory (new
process each) to open the index and give the first batch, and to resume at steps 1, 1,000 and 100,000.

Marks: at least 2 times the fastest other per core; plan at most 20 s and 1 GB; resume at most 2 s.
"""

from __future__ import annotations

import io
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from benchmarks.machine import keep, machine
from benchmarks.pack import measure, prepare
from core.command_line import CommandParser, accept_old_name

ROOT = Path(__file__).resolve().parent.parent
BATCH = 8  # clips a batch of the ways that count clips
BATCH_SECONDS = 120.0  # audio a micro-batch of the ways that count seconds
RATE = 16_000
WAYS = ("this project", "webdataset 30 s", "webdataset longest", "lhotse", "datasets")


class Tally:
    """Counts batches: clips, seconds of audio, and frames with and without padding."""

    def __init__(self):
        """Starts the clock: imports and set-up are done by then, worker processes are not started."""
        self.clips, self.seconds, self.frames, self.padded = 0, 0.0, 0, 0
        self._used, self._began = self.processor(), time.perf_counter()

    @staticmethod
    def processor() -> float:
        """Processor seconds of this process and of the workers that have ended."""
        return sum(
            u.ru_utime + u.ru_stime
            for u in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        )

    def result(self) -> dict:
        return {
            "clips": self.clips,
            "audio_seconds": self.seconds,
            "wall": time.perf_counter() - self._began,
            "cpu": self.processor() - self._used,
            "padding": 1 - self.frames / self.padded,
        }

    def add(self, lengths_seconds: list[float], padded_frames: int) -> None:
        self.clips += len(lengths_seconds)
        self.seconds += sum(lengths_seconds)
        self.frames += round(sum(lengths_seconds) * 100)
        self.padded += padded_frames


def this_project(folder: Path, workers: int, llm: str) -> Tally:
    import torch

    from model.config import SoundwaveConfig
    from model.features import log_mel
    from model.language_model import load_tokenizer
    from model.pretrained import locate
    from recipe.config import Corpus, DataConfig
    from stream import Plan, Stream

    data = DataConfig(
        train=[Corpus(shards=str(folder / "shards"))],
        batch_seconds=4 * BATCH_SECONDS,
        micro_batch_seconds=BATCH_SECONDS,
        workers=workers,
    )
    plan = Plan.open(data, "alignment", 10**6)
    steps = 1
    while plan.passes(steps)["shards/asr"] < 1:
        steps += 1
    config = SoundwaveConfig()
    stream = Stream(
        data, "alignment", load_tokenizer(locate(llm), config.audio_token), config, 0, 1, 0, steps, plan=plan
    )
    log_mel(torch.zeros(1, RATE), torch.tensor([RATE]), 80)  # builds its filters
    tally = Tally()
    for step in stream:
        for batch in step.micro_batches:
            mel, _ = log_mel(batch.waveforms, batch.audio_lengths, 80)
            tally.add((batch.audio_lengths / RATE).tolist(), mel.shape[0] * mel.shape[2])
    return tally


def _decode(audio: bytes) -> np.ndarray:
    import soundfile

    return soundfile.read(io.BytesIO(audio), dtype="float32")[0]


class _Features:
    """Clips to log-mel in a worker; `whole`: padded to 30 s."""

    def __init__(self, whole: bool):
        from transformers import WhisperFeatureExtractor

        self.extract, self.padding = WhisperFeatureExtractor(), "max_length" if whole else "longest"

    def __call__(self, samples: list[dict]) -> tuple:
        waves = [_decode(sample["flac"]) for sample in samples]
        mel = self.extract(
            waves, sampling_rate=RATE, return_tensors="pt", padding=self.padding
        ).input_features
        return mel, [len(wave) / RATE for wave in waves]


def _one_thread(_: int) -> None:
    import torch

    torch.set_num_threads(1)


def _loop(dataset, workers: int) -> Tally:
    from torch.utils.data import DataLoader

    tally = Tally()
    for mel, seconds in DataLoader(dataset, batch_size=None, num_workers=workers, worker_init_fn=_one_thread):
        tally.add(seconds, mel.shape[0] * mel.shape[2])
    return tally


def webdataset_way(folder: Path, workers: int, llm: str, whole: bool) -> Tally:
    import webdataset as wds

    urls = [str(path) for path in sorted((folder / "shards").glob("*.tar"))]
    pipeline = wds.DataPipeline(
        wds.SimpleShardList(urls),
        wds.split_by_worker,
        wds.tarfile_to_samples(),
        wds.shuffle(500),
        wds.batched(BATCH, collation_fn=None),
        wds.map(_Features(whole)),
    )
    return _loop(pipeline, workers)


def datasets_way(folder: Path, workers: int, llm: str) -> Tally:
    import datasets
    from torch.utils.data import DataLoader

    shards = [str(path) for path in sorted((folder / "shards").glob("*.tar"))]
    source = {"path": "webdataset", "data_files": shards, "split": "train", "streaming": True}
    columns = datasets.load_dataset(**source).features
    # As bytes: its own Audio type wants torchcodec, also where nothing is decoded.
    stream = datasets.load_dataset(
        **source, features=datasets.Features({**columns, "flac": datasets.Value("binary")})
    )
    stream = stream.shuffle(seed=0, buffer_size=500)
    features = _Features(whole=False)

    def batch(columns: dict) -> dict:
        mel, seconds = features([{"flac": audio} for audio in columns["flac"]])
        return {"mel": [mel], "seconds": [seconds]}

    made = stream.map(batch, batched=True, batch_size=BATCH, remove_columns=list(columns)).with_format(
        "torch"
    )
    loader = DataLoader(
        made, batch_size=None, num_workers=min(workers, len(shards)), worker_init_fn=_one_thread
    )
    tally = Tally()
    for row in loader:
        tally.add([float(s) for s in row["seconds"]], row["mel"].shape[0] * row["mel"].shape[2])
    return tally


def lhotse_way(folder: Path, workers: int, llm: str) -> Tally:
    import torch
    from lhotse import CutSet, Fbank
    from lhotse.dataset import DynamicBucketingSampler, OnTheFlyFeatures, make_worker_init_fn
    from lhotse.dataset.iterable_dataset import IterableDatasetWrapper
    from lhotse.utils import is_module_available

    extractor = Fbank()
    if is_module_available("librosa"):
        from lhotse.features.whisper_fbank import WhisperFbank

        extractor = WhisperFbank()

    class Ready(torch.utils.data.Dataset):
        def __init__(self):
            self.features = OnTheFlyFeatures(extractor)

        def __getitem__(self, cuts):
            features, lengths = self.features(cuts)[:2]
            return features, [cut.duration for cut in cuts]

    cuts = CutSet.from_shar(in_dir=folder / "shar", shuffle_shards=True, split_for_dataloading=workers > 1)
    sampler = DynamicBucketingSampler(
        cuts, max_duration=BATCH_SECONDS, num_buckets=10, shuffle=True, rank=0, world_size=1
    )
    loader = torch.utils.data.DataLoader(
        IterableDatasetWrapper(Ready(), sampler),
        batch_size=None,
        num_workers=workers,
        worker_init_fn=make_worker_init_fn(seed=0) if workers else None,
    )
    tally = Tally()
    for features, seconds in loader:
        tally.add(seconds, features.shape[0] * features.shape[1])
    return tally


def run(way: str, folder: Path, workers: int, llm: str) -> dict:
    """One way, in this process."""
    import torch

    torch.set_num_threads(1)
    ways = {
        "this project": this_project,
        "lhotse": lhotse_way,
        "datasets": datasets_way,
        "webdataset 30 s": lambda *a: webdataset_way(*a, whole=True),
        "webdataset longest": lambda *a: webdataset_way(*a, whole=False),
    }
    return ways[way](folder, workers, llm).result()


def large_index(folder: Path, utterances: int) -> Path:
    """A packed folder with an index of that many made-up utterances; its shards are sparse files without
    content."""
    from data_tools.shards import SAMPLE_DTYPE, ShardSummary, write_index

    if (folder / "index.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    size, per_shard = 1 << 20, 1000

    def summaries():
        for shard in range(utterances // per_shard):
            random = np.random.default_rng(shard)
            rows = np.zeros(per_shard, SAMPLE_DTYPE)
            rows["audio_size"], rows["characters"], rows["json_size"] = (
                1000,
                random.integers(10, 300, per_shard),
                100,
            )
            rows["duration"] = np.clip(random.normal(12, 4, per_shard), 1, 30)
            rows["id_hash"] = random.integers(0, 2**63, per_shard)
            name = f"large-{shard:06d}.tar"
            with open(folder / name, "wb") as file:
                file.truncate(size)
            yield ShardSummary(name, rows, size, f"{shard:064x}", ["asr"], ["en"], ["flac"])

    write_index(folder, "large", list(summaries()))
    return folder


def plan_once(folder: Path, step: int) -> dict:
    """Open the index and give the batch of `step`, dealt to 64 ranks; seconds and peak memory of this
    process."""
    from recipe.config import Corpus, DataConfig
    from stream.assign import Budgets, assign
    from stream.plan import Plan

    data = DataConfig(train=[Corpus(shards=str(folder))], batch_seconds=64 * 240.0, micro_batch_seconds=120.0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began, used = time.perf_counter(), time.process_time()
    plan = Plan.open(data, "alignment", 10**6)
    opened = time.perf_counter()
    batch = plan.global_batch(step)
    assign(batch["seconds"], batch["positions"], 64, Budgets.of(data))
    ready, used = time.perf_counter(), time.process_time() - used
    again = time.perf_counter()
    batch = plan.global_batch(step + 1)
    assign(batch["seconds"], batch["positions"], 64, Budgets.of(data))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "open": opened - began,
        "batch": ready - opened,
        "next": time.perf_counter() - again,
        "total": ready - began,
        "cpu": used,
        "peak_mb": peak / 1024,
        "imports_mb": before / 1024,
    }


def child(*arguments: object) -> dict:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.stream", *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{arguments}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def corpora(folder: Path, manifest: Path | None, hours: float, workers: int, with_lhotse: bool) -> None:
    """The same clips as our shards and as lhotse's; made once. Errors: as prepare."""
    rows_path, cuts, _ = prepare(folder, manifest, hours)
    for way, out in (("this project", "shards"), ("lhotse", "shar")):
        done = folder / f".{out}.done"
        if not done.exists() and (way != "lhotse" or with_lhotse):
            measure(way, rows_path, cuts, folder / out, workers)
            done.touch()


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--way"]:
        print(json.dumps(run(argv[1], Path(argv[2]), int(argv[3]), argv[4])))
        return 0
    if argv[:1] == ["--plan"]:
        print(json.dumps(plan_once(Path(argv[1]), int(argv[2]))))
        return 0
    parser = CommandParser("python -m benchmarks.stream", __doc__, example="--hours 1")
    parser.add_argument("--manifest", type=Path, help="real speech (id, audio, text); default: made up")
    parser.add_argument("--hours", type=float, default=1.0, help="hours of audio, about")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="worker processes of each loader")
    parser.add_argument(
        "--repeats", type=int, default=3, help="runs of each way, taken in turn; the best counts"
    )
    accept_old_name(parser, "--repeat", "--repeats")
    parser.add_argument(
        "--utterances", type=int, default=10_000_000, help="of the large plan; 0: leave it out"
    )
    parser.add_argument(
        "--cache",
        type=Path,
        default=ROOT / ".cache" / "benchmark-stream",
        help="for clips and shards (large)",
    )
    accept_old_name(parser, "--folder", "--cache")
    parser.add_argument(
        "--tokenizer",
        default=".cache/quickstart/models/smollm2-135m",
        help="folder with the tokenizer (make fetch)",
    )
    accept_old_name(parser, "--llm", "--tokenizer")
    parser.add_argument("--out", type=Path, help="where to write the numbers, the table beside them (.txt)")
    accept_old_name(parser, "--json", "--out")
    options = parser.parse_args(argv)
    facts = machine()
    ways = [way for way in WAYS if way not in ("lhotse", "datasets") or _installed(way)]
    folder = options.cache.absolute()
    corpora(folder, options.manifest, options.hours, options.workers, "lhotse" in ways)
    runs: dict[str, list[dict]] = {way: [] for way in ways}
    for _ in range(options.repeats):
        for way in ways:
            runs[way].append(child("--way", way, folder, options.workers, options.tokenizer))
    best = {way: min(repeats, key=lambda r: r["cpu"] / r["audio_seconds"]) for way, repeats in runs.items()}
    ours = best["this project"]
    hours = ours["audio_seconds"] / 3600
    lines = [
        f"{hours:.2f} h, {ours['clips']} clips, {options.workers} workers, best of {options.repeats}",
        "",
    ]
    add = lines.append
    add(f"{'way':20}{'clips/s':>9}{'audio s/s':>11}{'audio s/core s':>16}{'padding':>9}")
    for way, n in best.items():
        add(
            f"{way:20}{n['clips'] / n['wall']:9.1f}{n['audio_seconds'] / n['wall']:11.0f}"
            f"{n['audio_seconds'] / n['cpu']:16.0f}{n['padding']:9.1%}"
        )
    per_core = {way: n["audio_seconds"] / n["cpu"] for way, n in best.items()}
    ratio = per_core["this project"] / max(value for way, value in per_core.items() if way != "this project")
    marks = {"fastest other, per core": {"value": ratio, "mark": 2.0, "reached": ratio >= 2}}
    plans = {}
    if options.utterances:
        large = large_index(folder / f"large-{options.utterances}", options.utterances)
        child("--plan", large, 0)  # the index into the page cache
        add(
            f"\nplan of {options.utterances:,} "
            f"utterances\n{'step':>9}{'open s':>9}{'batch s':>9}{'next s':>9}{'CPU s':>9}"
            f"{'peak MB':>9}"
        )
        for step in (0, 1, 1000, 100_000):
            plans[step] = n = child("--plan", large, step)
            add(
                f"{step:9,}{n['open']:9.2f}{n['batch']:9.3f}{n['next']:9.3f}{n['cpu']:9.2f}"
                f"{n['peak_mb']:9.0f}"
            )
        worst = max(n["total"] for n in plans.values())
        peak = max(n["peak_mb"] for n in plans.values()) / 1024
        marks |= {
            "plan, seconds": {"value": plans[0]["total"], "mark": 20.0, "reached": plans[0]["total"] <= 20},
            "plan, GB": {"value": peak, "mark": 1.0, "reached": peak <= 1},
            "resume, seconds": {"value": worst, "mark": 2.0, "reached": worst <= 2},
        }
    add("")
    for name, mark in marks.items():
        add(
            f"{name:26}{mark['value']:8.2f}   mark {mark['mark']:g}   "
            f"{'reached' if mark['reached'] else 'missed'}"
        )
    print("\n".join(lines))
    if options.out:
        keep(
            options.out,
            {
                "machine": facts,
                "workers": options.workers,
                "hours": options.hours,
                "runs": runs,
                "plans": plans,
                "marks": marks,
            },
            "\n".join(lines),
        )
    return 0


def _installed(package: str) -> bool:
    import importlib.util

    if importlib.util.find_spec(package) is None:
        print(f"{package} is not installed (make setup EXTRAS=bench): left out")
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
