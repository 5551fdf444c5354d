"""Copy the recipe's shards to a node's own disk before training, for file systems that many nodes read
slowly.

    srun --ntasks-per-node=1 python -m train.staging RECIPE [key=value ...]      (slurm/common.sh,
    STAGE_SHARDS=1)

Copies go to $SOUNDWAVE_LOCAL_SHARDS/FINGERPRINT/, where ShardIndex finds them; only complete, checked files
carry a shard's name. The recipe and the index stay as they are. A corpus for which there is no room is left
where it is, with a line.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

from tqdm import tqdm

from core.object_store import joined
from core.private_folder import private_folder
from data_tools.shards import ShardError, ShardIndex
from recipe.config import RecipeError, load_recipe
from train.preemption import DONE, FAILED, WRONG_INPUT
from train.preflight import node_name, packed_folders

BLOCK = 16 << 20  # bytes; large reads are what parallel file systems are fast at
COPIES_AT_A_TIME = 4
RESERVE = 0.05  # share of the local disk left free


def copy_shard(index: ShardIndex, shard: dict, target: Path, progress: tqdm) -> None:
    """Errors: ShardError where the bytes read are not those that the index knows; OSError."""
    unfinished = target.with_name(f".{target.name}.{os.getpid()}")
    source, sha256 = joined(index.location, shard["url"]), shard["sha256"]
    digest = hashlib.sha256()
    try:
        if index.is_remote:
            index.download(index.shards.index(shard), unfinished)
        with (
            open(unfinished if index.is_remote else source, "rb") as reader,
            nullcontext() if index.is_remote else open(unfinished, "wb") as writer,
        ):
            while block := reader.read(BLOCK):
                digest.update(block)
                if writer is not None:
                    writer.write(block)
                progress.update(len(block))
        if digest.hexdigest() != sha256:
            raise ShardError(f"shard {source} does not have the checksum of its index: copy or pack it again")
        os.replace(unfinished, target)
    finally:
        unfinished.unlink(missing_ok=True)


def size(path: Path) -> int | None:
    return path.stat().st_size if path.exists() else None


def stage_corpus(shards: str, local: Path) -> str:
    """Copy what is not there yet; returns a one-line report. Errors: ShardError, OSError."""
    index = ShardIndex.load(shards)  # names and fingerprint are plain file names, so nothing leaves `local`
    folder = private_folder(local) / index.fingerprint
    folder.mkdir(exist_ok=True)
    for left in folder.glob(".*.tar.*"):  # by a job that a signal ended
        if not Path(f"/proc/{left.suffix[1:]}").exists():
            left.unlink(missing_ok=True)
    # A shard that is cut where it lies is read from there: the stream leaves out what it has lost (the
    # preflight has told).
    cut = {line.split(" ")[0] for line in index.damaged}
    whole = [s for s in index.shards if joined(index.location, s["url"]) not in cut]
    todo = [s for s in whole if size(folder / s["url"]) != s["filesize"]]
    needed, disk = sum(s["filesize"] for s in todo), shutil.disk_usage(folder)
    if needed > disk.free - RESERVE * disk.total:
        return f"{shards}: {needed / 1e9:.2f} GB do not fit into {disk.free / 1e9:.2f} GB free in {local}; read from where it is"  # noqa: E501
    with (
        tqdm(
            total=needed, unit="B", unit_scale=True, desc=f"{node_name()} {shards}", mininterval=10
        ) as progress,
        ThreadPoolExecutor(COPIES_AT_A_TIME) as pool,
    ):
        copies = [pool.submit(copy_shard, index, s, folder / s["url"], progress) for s in todo]
        for copy in copies:
            copy.result()
    return f"{shards}: {len(todo)} of {len(index.shards)} shards copied to {folder}, {needed / 1e9:.2f} GB"


def main(argv: list[str]) -> int:
    local = Path(os.environ["SOUNDWAVE_LOCAL_SHARDS"])
    try:
        for corpus in packed_folders(load_recipe(argv[0], argv[1:])):
            print(f"staging: node {node_name()}: {stage_corpus(corpus.shards, local)}")
    except (RecipeError, ShardError) as error:
        print(f"error: node {node_name()}: {error}", file=sys.stderr)
        return WRONG_INPUT
    except OSError as error:
        print(f"error: node {node_name()}: {error}: see LOCAL_DISK={local.parent}", file=sys.stderr)
        return FAILED
    return DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
