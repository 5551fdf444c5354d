"""Checkpoints: complete or not there. What was trained, the optimizer, the position; the frozen base by hash,
never by bytes.

    <stage folder>/checkpoints/
        step-000500/            one checkpoint: DeepSpeed's files of all ranks, state.json, manifest.json
                                (sha256 of each file)
        step-001000.partial/    one being written, or what a kill left of it; removed at the next start,
                                unless its manifest stands: then only the rename was missing
        step-000500.damaged/    one that was found damaged when the run was started again; nothing but eyes
                                looks at it
        latest                  name of the newest finished one; moves last
        best.json               step and score of the best validation so far

Writing: every rank copies its tensors to host memory and goes on training; a thread of its own writes, hashes
and syncs them to `step-N.partial`. When all ranks report that they are done (a flag in the next step's
all-reduce), rank 0 writes the manifest, syncs, renames the folder and moves `latest`. A kill at any instant
leaves the previous checkpoint as it was. Cost: one copy of what is trained and its optimizer states (12 to 14
bytes a parameter, divided by the number of ranks) in host memory.

Reading: newest first; a folder whose files do not have the size and sha256 of its manifest is set aside, with
a line: were it left among the others, it would be kept as the newest in place of good ones. Another number of
ranks than at the time of writing: train/universal.py.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import pickle
import re
import shutil
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine

from core.console import OneLine
from core.distributed import Ranks
from core.file_names import UnsafeName, file_size_inside, plain_name
from core.files import PARTIAL, STEP, step_folders, sync_folder, write_atomically
from core.json_files import JsonError, read_object
from recipe.config import CheckpointConfig
from train import universal
from train.deepspeed_fixes import safe_load
from train.deepspeed_fixes.optimizer import untie_step_counters

logger = logging.getLogger("soundwave")
REPLACED, DAMAGED = ".replaced", ".damaged"
_SHA256 = re.compile(r"[0-9a-f]{64}")
# What loading a file with another content than `save` writes ends in.
_WRONG_CONTENT = (
    pickle.UnpicklingError,
    LookupError,
    TypeError,
    ValueError,
    AttributeError,
    AssertionError,
    EOFError,
    RuntimeError,
)
COPY_SECONDS = 60  # a second file system that takes longer to let go of one checkpoint misses the next
LAST_COPY_SECONDS = 1800  # but what it gets at the end it has time for


class CheckpointError(OneLine, RuntimeError):
    """A checkpoint that cannot be written or used; one line: what, where, what to do."""


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _HashingFile:
    """A file for torch.save that hashes what passes, so that no byte is read twice."""

    def __init__(self, path: Path):
        self.file = open(path, "wb")
        self.digest = hashlib.sha256()
        self.size = 0

    def write(self, data) -> int:
        self.digest.update(data)
        self.size += memoryview(data).nbytes
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()

    def close(self) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()


def _on_host(value):
    """A copy of a nested state that later optimizer steps cannot change."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return type(value)((k, _on_host(v)) for k, v in value.items())
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_on_host(v) for v in value))
    if isinstance(value, (list, tuple)):
        return type(value)(_on_host(v) for v in value)
    return value


class BackgroundWriter(CheckpointEngine):
    """DeepSpeed hands its states here instead of to torch.save: copied at once, written by a thread."""

    def __init__(self):
        super().__init__()
        self.name = "BackgroundWriter"
        self.thread: threading.Thread | None = None
        self.pending: list[tuple[dict, Path]] = []
        self.queued: set[str] = set()  # names of the files that the thread has to write
        self.written: dict[str, dict] = {}  # file name -> size and sha256
        self.error: BaseException | None = None

    def create(self, info) -> None:
        pass

    def save(self, state_dict, path: str) -> None:
        self.pending.append((_on_host(state_dict), Path(path)))

    def load(self, path: str, map_location=None):
        return torch.load(path, map_location=map_location, weights_only=True)  # inside safe_load.data_only

    def commit(self, info) -> bool:
        return True

    def preserves_storage_sharing(self) -> bool:
        return False

    def start(self) -> None:
        self.written, self.error = {}, None
        work, self.pending = self.pending, []
        self.queued = {path.name for _, path in work}

        def write() -> None:
            try:
                for state, path in work:
                    file = _HashingFile(path)
                    try:
                        torch.save(state, file)
                    finally:
                        file.close()
                    self.written[path.name] = {"size": file.size, "sha256": file.digest.hexdigest()}
            except BaseException as error:  # whatever it was, memory for one: a thread's end tells nobody
                self.error = error

        self.thread = threading.Thread(target=write, name="checkpoint-writer")
        self.thread.start()

    @property
    def busy(self) -> bool:
        return self.thread is not None and self.thread.is_alive()

    def wait(self) -> None:
        if self.thread is not None:
            self.thread.join()

    @property
    def problem(self) -> str | None:
        """Why not all that was queued is on disk; asked when the thread has ended."""
        if self.error is not None:
            return str(self.error) or repr(self.error)
        missing = sorted(self.queued - self.written.keys())
        return f"not written: {', '.join(missing)}" if missing else None


def manifest_files(folder: Path) -> dict[str, dict]:
    """Return name -> {"size", "sha256"} of a checkpoint's files. All names are plain: nothing outside the
    folder is read.

    Errors: ValueError for a manifest that is missing or not as `save` writes it.
    """
    try:
        files = read_object(folder / "manifest.json").get("files")
        if not isinstance(files, dict) or "state.json" not in files:
            raise ValueError("does not list state.json")
        for name, fact in files.items():
            plain_name(name)
            if (
                not isinstance(fact, dict)
                or not _is_count(fact.get("size"))
                or not _SHA256.fullmatch(str(fact.get("sha256")))
            ):
                raise ValueError("has an entry without size and sha256")
    except ValueError as error:
        raise ValueError(f"manifest.json {error}") from None
    return files


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**62


def verify(folder: Path, *, part: int = 0, parts: int = 1) -> str | None:
    """None where the folder is complete and sound, else what is wrong. `part` of `parts`: hash only every
    parts-th file."""
    name = "manifest.json"
    try:
        files = manifest_files(folder)
        for name, fact in files.items():
            size = file_size_inside(folder, name)
            if size != fact["size"]:
                return f"{name} has {size} bytes instead of {fact['size']}"
        for name in sorted(files)[part::parts]:
            if sha256_of(folder / name) != files[name]["sha256"]:
                return f"{name} does not have its sha256"
        name = "state.json"
        check_state(read_state(folder), folder)
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read: {error}"
    except UnsafeName as error:
        return f"{name} {error}"
    except ValueError as error:
        return str(error)
    return None


def read_state(folder: Path) -> dict:
    """Errors: ValueError."""
    try:
        return read_object(folder / "state.json")
    except JsonError as error:
        raise ValueError(f"state.json {error}") from None


def check_state(state: dict, folder: Path) -> None:
    """Errors: ValueError for a value that is missing or of another type than `save` is given."""
    topology, health, best = state.get("topology"), state.get("health"), state.get("best")
    right = {
        "step": _is_count(state.get("step"))
        and STEP.match(folder.name)
        and int(STEP.match(folder.name)[1]) == state["step"],
        "data_offset": _is_count(state.get("data_offset")),
        "topology": isinstance(topology, dict)
        and _is_count(topology.get("world_size"))
        and topology["world_size"] > 0
        and topology.get("zero_stage") in (1, 2, 3),
        "health": isinstance(health, dict)
        and all(_is_count(health.get(key)) for key in ("consecutive", "skipped", "rollbacks"))
        and isinstance(health.get("norms"), list)
        and all(_is_finite(norm) for norm in health["norms"]),
        "best": "best" in state and (best is None or is_best(best)),
        "facts": isinstance(state.get("facts"), dict),
    }
    wrong = [key for key, sound in right.items() if not sound]
    if wrong:
        raise ValueError(f"state.json has no valid '{wrong[0]}'")


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def is_best(best: object) -> bool:
    """Whether `best` is what a validation leaves: {"step", "score", "by"}."""
    return (
        isinstance(best, dict)
        and _is_count(best.get("step"))
        and _is_finite(best.get("score"))
        and isinstance(best.get("by", ""), str)
    )


def saved_in_health(folder: Path) -> bool:
    """Whether no step was skipped right before it was saved. True where that cannot be read: `verify` tells
    of the damage."""
    try:
        return read_state(folder)["health"]["consecutive"] == 0
    except (OSError, ValueError, KeyError, TypeError):
        return True


def find_good(folders: list[Path], ranks: Ranks, *, among=lambda folder: True) -> Path | None:
    """The newest sound checkpoint, of the first folder that has one; hashing is shared among ranks, all
    return the same. Every damaged one before it gets a line and another name.

    among: asked on rank 0 for each folder, whether it is a candidate at all.
    """
    candidates = (
        [[str(p) for folder in folders for p in step_folders(folder) if among(p)]]
        if ranks.is_main
        else [None]
    )
    dist.broadcast_object_list(candidates, src=0)
    for name in candidates[0]:
        problems = [None] * ranks.world_size
        dist.all_gather_object(problems, verify(Path(name), part=ranks.rank, parts=ranks.world_size))
        problem = next((p for p in problems if p), None)
        if problem is None:
            return Path(name)
        if ranks.is_main:
            aside = _set_aside(Path(name))
            logger.warning(
                "checkpoint %s is damaged (%s): it is set aside as %s, and the one before it is taken",
                name,
                problem,
                aside,
            )
    return None


def _set_aside(folder: Path) -> str:
    """Give a damaged checkpoint its other name; returns that."""
    aside = folder.with_name(folder.name + DAMAGED)
    try:
        if aside.exists():
            shutil.rmtree(aside)
        os.rename(folder, aside)
    except OSError as error:
        return f"nothing, {error}"
    return aside.name


def _remove(folder: Path) -> None:
    """A checkpoint that is not wanted any more. What cannot be deleted now has another name, and goes at the
    next start."""
    gone = folder if folder.name.endswith(REPLACED) else folder.with_name(folder.name + REPLACED)
    try:
        if gone != folder:
            os.rename(folder, gone)
        shutil.rmtree(gone)
    except OSError as error:
        logger.warning("checkpoint %s could not be removed: %s", folder, error)


class Checkpoints:
    """Saves and loads for one stage. The methods are collective: call them on every rank at the same step."""

    def __init__(self, folder: Path, config: CheckpointConfig, ranks: Ranks):
        self.folder, self.config, self.ranks = folder, config, ranks
        self.writer = BackgroundWriter()
        self.target: Path | None = None  # the .partial folder being written
        self.started = 0.0
        self.save_seconds = (
            0.0  # the longest save so far, from snapshot to rename: the margin before a time limit
        )
        self.blocked_seconds = 0.0  # how long the last snapshot held up training
        self.copier: threading.Thread | None = None
        self.copying: Path | None = None
        if ranks.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            for leftover in folder.glob("*" + PARTIAL):
                final = leftover.with_name(leftover.name.removesuffix(PARTIAL))
                if (
                    leftover / "manifest.json"
                ).exists() and not final.exists():  # the manifest is written when all else is
                    os.rename(leftover, final)
                else:
                    shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
            copies = Path(config.copy_to) if config.copy_to else None
            for place in {folder, copies} - {None}:
                for old in place.glob("*" + REPLACED):  # what replaces it stands by now
                    _remove(old)
            for leftover in copies.glob("step-*" + PARTIAL) if copies else ():
                shutil.rmtree(leftover, ignore_errors=True)
        dist.barrier()

    # ---------------------------------------------------------------- writing

    def _needed_bytes(self, engine) -> int:
        """All ranks' files together: measured on the newest checkpoint, else 4 bytes a number for weights
        (twice: fp32 master and module) and the two moments, and 5 % more."""
        for newest in step_folders(self.folder):
            try:
                return int(1.05 * sum(fact["size"] for fact in manifest_files(newest).values()))
            except ValueError:
                continue
        trained = sum(
            getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters() if p.requires_grad
        )
        return int(1.05 * 16 * trained)

    def save(self, engine, state: dict) -> bool:
        """Start writing `step-<state["step"]>`. False, with a warning, where the disk has no room; training
        goes on."""
        self.finish()
        begun = time.perf_counter()
        target = self.folder / f"step-{state['step']:06d}{PARTIAL}"
        room = [None]
        if self.ranks.is_main:
            needed, free = self._needed_bytes(engine), shutil.disk_usage(self.folder).free
            room[0] = free >= needed
            if room[0]:
                try:
                    target.mkdir(exist_ok=True)
                    write_atomically(target / "state.json", json.dumps(state, indent=1))
                except OSError as error:  # a quota, for one, which the free space does not show
                    room[0] = False
                    shutil.rmtree(target, ignore_errors=True)
                    logger.error("no checkpoint in %s: %s; training goes on from memory", self.folder, error)
            else:
                logger.error(
                    "no room for a checkpoint in %s: it needs %.1f MB and %.1f MB are free; free space or "
                    "move "
                    "`output`, training goes on from memory",
                    self.folder,
                    needed / 1e6,
                    free / 1e6,
                )
        dist.broadcast_object_list(room, src=0)
        if not room[0]:
            return False
        ours, engine.checkpoint_engine = engine.checkpoint_engine, self.writer
        engine.save_checkpoint(
            str(self.folder),
            tag=target.name,
            save_latest=False,
            exclude_frozen_parameters=True,
            client_state={"universal_checkpoint_info": {"universal_checkpoint_version": 0.2}},
        )
        engine.checkpoint_engine = ours
        self.target, self.started = target, begun
        self.writer.start()
        self.blocked_seconds = time.perf_counter() - begun
        return True

    @property
    def written(self) -> bool:
        """This rank has written its part and waits for the others."""
        return self.target is not None and not self.writer.busy

    def finish(self) -> bool:
        """Wait for the writing in progress, if any, and publish it. Collective. False where it failed, with a
        line."""
        if self.target is None:
            return True
        self.writer.wait()
        parts = [None] * self.ranks.world_size
        dist.all_gather_object(parts, (self.writer.written, self.writer.problem))
        target, self.target = self.target, None
        problem = next((f"rank {rank}: {error}" for rank, (_, error) in enumerate(parts) if error), None)
        outcome = [problem]
        if self.ranks.is_main:
            if problem is None:
                try:
                    self._publish(
                        target, {name: fact for written, _ in parts for name, fact in written.items()}
                    )
                except OSError as error:
                    outcome = [str(error)]
            if outcome[0]:
                shutil.rmtree(target, ignore_errors=True)
                logger.error(
                    "checkpoint %s could not be written (%s): the one before it stays the last good one",
                    target.stem,
                    outcome[0],
                )
        dist.broadcast_object_list(outcome, src=0)
        self.save_seconds = max(self.save_seconds, time.perf_counter() - self.started)
        return outcome[0] is None

    def _publish(self, target: Path, files: dict[str, dict]) -> None:
        state = target / "state.json"
        files["state.json"] = {"size": state.stat().st_size, "sha256": sha256_of(state)}
        write_atomically(target / "manifest.json", json.dumps({"files": files}, indent=1))
        final = target.with_name(target.name.removesuffix(PARTIAL))
        replaced = final.with_name(final.name + REPLACED)
        if (
            final.exists()
        ):  # the same step again: saved and then asked to stop, or after a roll-back; the newer one counts
            os.rename(final, replaced)
        os.rename(target, final)
        sync_folder(self.folder)
        if replaced.exists():
            _remove(replaced)
        saved = json.loads((final / "state.json").read_text())
        if saved.get("best") and saved["best"]["step"] == saved["step"]:
            write_atomically(self.folder / "best.json", json.dumps(saved["best"]))
        write_atomically(self.folder / "latest", final.name)
        free = self._await_copy(COPY_SECONDS)  # before older ones go: it may be reading one of them
        self._prune(self.folder)
        if self.config.copy_to and free:
            self.copying = final
            self.copier = threading.Thread(
                target=self._copy, args=(final,), name="checkpoint-copier", daemon=True
            )
            self.copier.start()
        logger.info(
            "checkpoint %s: %.1f MB, training held up %.2f s, written in %.2f s",
            final,
            sum(fact["size"] for fact in files.values()) / 1e6,
            self.blocked_seconds,
            time.perf_counter() - self.started,
        )

    def _await_copy(self, seconds: float) -> bool:
        """Wait for the copy in progress, if any; not for ever: a second file system that hangs must not hold
        up the run."""
        if self.copier is not None:
            self.copier.join(seconds)
            if self.copier.is_alive():
                logger.error(
                    "checkpoint.copy_to: %s has not taken %s in %d s; the run goes on without waiting for it",
                    self.config.copy_to,
                    self.copying.name,
                    seconds,
                )
                return False
            self.copier = self.copying = None
        return True

    def _copy(self, source: Path) -> None:
        folder = Path(self.config.copy_to)
        try:
            partial = folder / (source.name + PARTIAL)
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(source, partial)
            shutil.rmtree(folder / source.name, ignore_errors=True)
            os.rename(partial, folder / source.name)
            sync_folder(folder)
            if (self.folder / "best.json").exists():
                write_atomically(folder / "best.json", (self.folder / "best.json").read_text())
            write_atomically(folder / "latest", source.name)
            self._prune(folder)
        except OSError as error:
            logger.error("checkpoint.copy_to: %s could not be copied to %s: %s", source.name, folder, error)

    def _prune(self, folder: Path) -> None:
        """Keep the last, the best, and the last one from before a bad stretch: a roll-back has to go
        somewhere."""
        best, there = self._best(folder) if self.config.keep_best else None, step_folders(folder)
        healthy = next((one for one in there if saved_in_health(one)), None)
        for old in there[max(1, self.config.keep_last) :]:
            if int(STEP.match(old.name)[1]) != best and old not in (healthy, self.copying):
                _remove(old)

    @staticmethod
    def _best(folder: Path) -> int | None:
        try:
            best = read_object(folder / "best.json")
        except JsonError:  # missing, for one
            return None
        return best["step"] if is_best(best) else None

    def close(self, *, hurry: bool = False) -> bool:
        """At the end. hurry: a time limit is near, which a copy must not make the job run into."""
        done = self.finish()
        if self.copier is not None and self.copier.is_alive():
            logger.info("waiting for the copy of %s to %s", self.copying.name, self.config.copy_to)
        self._await_copy(COPY_SECONDS if hurry else LAST_COPY_SECONDS)
        return done

    def forget_after(self, step: int, best: dict | None) -> dict | None:
        """Remove what was saved after `step`, here and in `copy_to`: the run goes another way from there.
        Collective.

        best: the best score so far at `step`. Returns it; None where its own checkpoint has gone since, for a
        better one that goes now: the next score is then the best of those that are kept.
        """
        kept = [best]
        if self.ranks.is_main:
            self._await_copy(COPY_SECONDS)  # it may be copying what goes
            if best and self.config.keep_best and not (self.folder / f"step-{best['step']:06d}").exists():
                kept = [None]
            self._forget_after(self.folder, step, kept[0])
            if self.config.copy_to and Path(self.config.copy_to).exists():
                try:
                    self._forget_after(Path(self.config.copy_to), step, kept[0])
                except OSError as error:  # a second folder must not end the run
                    logger.error(
                        "checkpoint.copy_to: what was saved after step %d could not be removed from %s: %s",
                        step,
                        self.config.copy_to,
                        error,
                    )
        dist.broadcast_object_list(kept, src=0)
        return kept[0]

    @staticmethod
    def _forget_after(folder: Path, step: int, best: dict | None) -> None:
        for later in step_folders(folder):
            if int(STEP.match(later.name)[1]) > step:
                shutil.rmtree(later)
        left = [path.name for path in step_folders(folder)]
        for name, text in (
            ("latest", left[0] if left else None),
            ("best.json", json.dumps(best) if best and f"step-{best['step']:06d}" in left else None),
        ):
            if text is not None:
                write_atomically(folder / name, text)
            else:
                (folder / name).unlink(missing_ok=True)

    # ---------------------------------------------------------------- reading

    def load(self, engine, folder: Path, saved: dict, now: dict) -> None:
        """Weights and optimizer from `folder` into an engine, fresh or in use. `saved`, `now`: topologies
        (train/universal.py).

        Rates, decay and names of the optimizer's groups stay the recipe's. Errors: RecipeError,
        ConversionError, CheckpointError.
        """
        groups = [
            {key: value for key, value in group.items() if key != "params"}
            for group in engine.optimizer.param_groups
        ]
        convert = universal.needed(saved, now, folder)
        source = universal.convert(folder, self.ranks) if convert else folder
        # The configuration's checkpoint.load_universal, which DeepSpeed reads at each load: a roll-back may
        # need the other kind.
        engine._config.load_universal_checkpoint = convert
        ours, engine.checkpoint_engine = engine.checkpoint_engine, self.writer
        try:
            with safe_load.data_only():
                path, _ = engine.load_checkpoint(
                    str(source.parent), tag=source.name, load_module_strict=False
                )
        except (
            _WRONG_CONTENT
        ) as error:  # its files have their hashes, so somebody else has written them like that
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise CheckpointError(
                f"checkpoint {folder} cannot be loaded ({safe_load.reason(error)}): remove it to resume from "
                "the one before it, or choose another output folder"
            ) from error
        finally:
            engine.checkpoint_engine = ours
        if path is None:
            raise CheckpointError(
                f"checkpoint {folder} has no files for rank {self.ranks.rank} of {self.ranks.world_size}"
            )
        for group, own in zip(engine.optimizer.param_groups, groups, strict=True):
            group.update(own)
        untie_step_counters(engine.optimizer)
