"""A cluster for the tests of this folder, and a project to submit from: a checkout with the top lines of its scripts edited."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from core.repository import PACKAGES
from tests.slurm import cluster as slurm
from tests.slurm.cluster import Cluster, wait_for

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
TOP_LINES = {"gpus-per-node": 2, "ntasks-per-node": 2, "cpus-per-task": 2}


@pytest.fixture(scope="session")
def slurm_installed() -> None:
    signal.signal(
        signal.SIGTERM, signal.default_int_handler
    )  # whoever ends the tests ends their daemons, too
    reason = slurm.install()
    if reason is not None:
        if os.environ.get("CI") == "true":
            pytest.fail(f"in CI the Slurm tests must run: {reason}")
        pytest.skip(reason)


@pytest.fixture(scope="module")
def cluster(slurm_installed):
    with Cluster() as running:
        yield running


def write_recipe(folder: Path, stage: str, number: int, text: str) -> Path:
    path = folder / "recipes" / f"stage{number}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"stage: {stage}\noutput: runs/test\n{text}")
    return path


class Project:
    """A checkout in `folder` and what a user does with it. `output` is where its recipes write."""

    def __init__(self, folder: Path, cluster: Cluster):
        self.folder, self.cluster = folder, cluster
        self.output = folder / "runs" / "test"
        leftovers = re.compile(r"\d+|(chain|pack)-.*|.*\.log")
        shutil.copytree(
            ROOT / "slurm", folder / "slurm", ignore=lambda _, names: filter(leftovers.fullmatch, names)
        )
        for name in (*PACKAGES, "ds_configs"):
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        self.edit_top_lines(TOP_LINES)

    def edit_top_lines(self, values: dict[str, object], scripts: str = "*.sh") -> None:
        for script in self.folder.glob(f"slurm/{scripts}"):
            text = script.read_text()
            for option, value in values.items():
                text = re.sub(rf"(?m)^#SBATCH --{option}=\S+", f"#SBATCH --{option}={value}", text)
            text = re.sub(r"(?m)^ENVIRONMENT=venv:\S+", f"ENVIRONMENT=venv:{sys.prefix}", text)
            script.write_text(text)

    def use_stand_in(self, preflight: bool = True) -> None:
        shutil.copy(HERE / "stand_in" / "run.py", self.folder / "train" / "run.py")
        if preflight:
            (self.folder / "train" / "preflight.py").rename(self.folder / "train" / "whole_preflight.py")
            shutil.copy(HERE / "stand_in" / "preflight.py", self.folder / "train" / "preflight.py")

    def recipe(self, stage: str, number: int, text: str = "") -> None:
        write_recipe(self.folder, stage, number, text)

    def run(self, *command: str, timeout: float = 300, env: dict | None = None) -> str:
        """A command of the user's, in the project's folder."""
        return self.cluster.client(
            *command, timeout=timeout, env={"DS_ACCELERATOR": "cpu", **(env or {})}, cwd=self.folder
        )

    def chain(self, *arguments: str, **options) -> list[str]:
        """Submit with slurm/chain.sh; the job ids."""
        text = self.run("bash", "slurm/chain.sh", "--recipes", "recipes", *arguments, **options)
        return re.findall(r"job (\d+), log", text)

    def sbatch(self, *arguments: str, env: dict | None = None) -> str:
        return self.run("sbatch", "--parsable", *arguments, env=env).strip()

    def log(self) -> str:
        """What all jobs of this project have printed, in the order of their ids."""
        paths = sorted(
            self.folder.glob("slurm/logs/*.log"), key=lambda p: int(p.stem.rsplit("-", 1)[1].split("_")[0])
        )
        return "\n".join(f"--- {path.name}\n{path.read_text()}" for path in paths)

    def events(self) -> list[tuple[str, str]]:
        path = self.output / "slurm.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [(line["stage"], line["event"]) for line in lines]

    def status(self) -> dict[str, dict[str, str]]:
        """What `python -m train.status` prints: stage -> its row, by column."""
        lines = self.run(sys.executable, "-m", "train.status", "runs/test").splitlines()
        edges = [(match.start(), match.end()) for match in re.finditer("-+", lines[1])]
        head, _, *rows = [[line[start : end + 1].strip() for start, end in edges] for line in lines]
        return {row[0].split()[1]: dict(zip(head, row, strict=True)) for row in rows}

    def wait_for_log(self, words: str, timeout: float = 600, count: int = 1) -> None:
        wait_for(
            lambda: self.log().count(words) >= count, timeout, lambda: f"{words!r} in the logs:\n{self.log()}"
        )

    def expect(self, job: str, state: str, timeout: float = 900) -> dict[str, str]:
        """Wait until the job has ended, and in this state; on another one the logs are the message."""
        facts = self.cluster.wait(job, timeout=timeout)
        assert facts["JobState"] == state, f"job {job} is {facts['JobState']}, not {state}\n{self.log()}"
        return facts


class Assets:
    """What training needs, as small as it can be: a random Whisper and Llama, and chirps that sing their transcript."""

    STAGES = ("alignment", "shrinking", "sft")
    STEPS = {"alignment": 6, "shrinking": 24, "sft": 20}  # enough in stages 2 and 3 to be disturbed half-way

    def __init__(self, folder: Path):
        import torch

        from tests.model import tiny

        torch.manual_seed(0)
        self.folder, self.shards = folder, folder / "shards"
        self.encoder = tiny.whisper(folder / "whisper", mels=80)
        self.llm = tiny.llm(folder / "llm")
        self._pack()

    def _pack(self) -> None:
        """Two shards of 12 one-second clips; each letter of a transcript is a tone."""
        import numpy
        import soundfile

        from data_tools.shards import ShardWriter, write_index

        self.shards.mkdir()
        random, summaries = numpy.random.default_rng(0), []
        for shard in range(2):
            name = f"chirps-{shard:06d}.tar"
            writer = ShardWriter(self.shards / name)
            for clip in range(12):
                text = "".join(random.choice(list("abcd"), 4))
                tones = [
                    numpy.sin(2 * numpy.pi * (300 + 200 * "abcd".index(c)) * numpy.arange(4000) / 16000)
                    for c in text
                ]
                sound = io.BytesIO()
                soundfile.write(sound, 0.3 * numpy.concatenate(tones).astype("float32"), 16000, format="FLAC")
                writer.add(
                    f"{shard}-{clip}",
                    sound.getvalue(),
                    "flac",
                    {
                        "id": f"{shard}-{clip}",
                        "corpus": "chirps",
                        "task": "asr",
                        "text": text,
                        "lang": "en",
                        "duration": 1.0,
                        "sample_rate": 16000,
                    },
                )
            summaries.append(writer.close(name))
        write_index(self.shards, "chirps", summaries)

    def recipes(self, folder: Path) -> list[Path]:
        """The three stages' recipes, in FOLDER/recipes."""
        return [
            write_recipe(
                folder,
                stage,
                number,
                f"""
model: {{encoder: {{name: {self.encoder}}}, llm: {{name: {self.llm}, lora_r: 4}}}}
data: {{train: [{{shards: {self.shards}}}], batch_seconds: 8.0, micro_batch_seconds: 4.0, workers: 1, prefetch: 2}}
optim: {{steps: {self.STEPS[stage]}, warmup_steps: 2}}
checkpoint: {{every_steps: 5}}
log: {{every_steps: 1, tensorboard: false}}
""",
            )
            for number, stage in enumerate(self.STAGES, start=1)
        ]


@pytest.fixture(scope="session")
def assets(tmp_path_factory) -> Assets:
    return Assets(tmp_path_factory.mktemp("assets"))


@pytest.fixture(scope="session")
def undisturbed(assets, tmp_path_factory) -> Path:
    """The output folder of the three stages, trained by two ranks that nothing disturbed (undisturbed.py)."""
    folder = tmp_path_factory.mktemp("undisturbed")
    command = [sys.executable, "-m", "tests.slurm.undisturbed", *map(str, assets.recipes(folder))]
    ranks = {
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(slurm.free_ports(1)[0]),
        "PYTHONPATH": str(ROOT),
    }
    with open(folder / "log", "w") as log:
        running = [
            subprocess.Popen(
                command, cwd=folder, env={**os.environ, **ranks, "RANK": str(rank)}, stdout=log, stderr=log
            )
            for rank in range(2)
        ]
        try:
            codes = [process.wait(timeout=1200) for process in running]
        finally:
            for process in running:
                process.kill()
    assert codes == [0, 0], (folder / "log").read_text()
    return folder / "runs" / "test"


@pytest.fixture
def project(cluster, tmp_path) -> Project:
    """The stand-in trainer and recipes of 5 steps (1 s) for three stages."""
    made = Project(tmp_path / "project", cluster)
    made.use_stand_in()
    for number, stage in enumerate(Assets.STAGES, start=1):
        made.recipe(stage, number, "optim: {steps: 5}\ndata: {train: [{shards: none}]}\n")
    return made


@pytest.fixture(autouse=True)
def empty_queue(request):
    """No test leaves jobs to the next one."""
    yield
    if "cluster" in request.fixturenames:
        running = request.getfixturevalue("cluster")
        running.client("scancel", "--user", "root", check=False)
        wait_for(lambda: not running.client("squeue", "-h").strip(), 60, "an empty queue")
