"""Save and load the checkpoints of one stage."""

from __future__ import annotations

import json
import logging
import os
import pickle
import shutil
import time
from pathlib import Path

import torch
import torch.distributed as dist

from core.distributed import Ranks, from_main, gather
from core.files import PARTIAL, step_folders, sync_folder, write_atomically
from core.memory import is_out_of_memory
from model.lora_init import starts
from recipe.config import CheckpointConfig
from train.checkpoint import universal
from train.checkpoint.errors import CheckpointError
from train.checkpoint.mirror import COPY_SECONDS, LAST_COPY_SECONDS, Mirror
from train.checkpoint.retention import REPLACED, clean_up, delete_after, prune, remove
from train.checkpoint.verification import manifest_files, sha256_of
from train.checkpoint.writer import BackgroundWriter
from train.deepspeed_fixes import safe_load
from train.deepspeed_fixes.optimizer import untie_step_counters
from train.weight_average import WeightAverage

logger = logging.getLogger("soundwave")
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
        self.mirror = Mirror(folder, config)
        if ranks.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            clean_up(folder)
            self.mirror.clean_up()
        dist.barrier()

    # ---------------------------------------------------------------- writing

    def _needed_bytes(self, engine, averages: bool = False) -> int:
        """All ranks' files together: measured on the newest checkpoint, else 4 bytes a number for weights
        (twice: fp32 master and module), the two moments and their average, LoRA's start, and 5 % more."""
        for newest in step_folders(self.folder):
            try:
                return int(1.05 * sum(fact["size"] for fact in manifest_files(newest).values()))
            except ValueError:
                continue
        trained = sum(
            getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters() if p.requires_grad
        )
        files = self.ranks.world_size if engine.zero_optimization_stage() == 3 else 1  # with the start
        frozen = files * sum(start.nbytes for start in starts(engine.module).values())
        return int(1.05 * ((20 if averages else 16) * trained + frozen))

    def _average_file(self, folder: Path) -> Path:
        return folder / f"averages_rank_{self.ranks.rank:05d}.pt"

    def save(self, engine, state: dict, average: dict | None = None) -> bool:
        """Start writing `step-<state["step"]>`. average: this rank's averaged weights. False, with a warning,
        where the disk has no room; training continues."""
        self.finish()
        started = time.perf_counter()
        target = self.folder / f"step-{state['step']:06d}{PARTIAL}"
        has_room = False
        if self.ranks.is_main:
            needed = self._needed_bytes(engine, average is not None)
            free = shutil.disk_usage(self.folder).free
            has_room = free >= needed
            if has_room:
                try:
                    target.mkdir(exist_ok=True)
                    write_atomically(target / "state.json", json.dumps(state, indent=1))
                except OSError as error:  # a quota, for one, which the free space does not show
                    has_room = False
                    shutil.rmtree(target, ignore_errors=True)
                    logger.error("no checkpoint in %s: %s; training continues without", self.folder, error)
            else:
                logger.error(
                    "no room for a checkpoint in %s: it needs %.1f MB and %.1f MB are free; free space or "
                    "move "
                    "`output`, training continues without",
                    self.folder,
                    needed / 1e6,
                    free / 1e6,
                )
        if not from_main(has_room):
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
        if average is not None:
            self.writer.save(average, str(self._average_file(target)))
        self.target, self.started = target, started
        self.writer.start()
        self.blocked_seconds = time.perf_counter() - started
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
        parts = gather((self.writer.written, self.writer.problem))
        target, self.target = self.target, None
        problem = next((f"rank {rank}: {error}" for rank, (_, error) in enumerate(parts) if error), None)
        if self.ranks.is_main:
            if problem is None:
                try:
                    self._publish(
                        target, {name: fact for written, _ in parts for name, fact in written.items()}
                    )
                except OSError as error:
                    problem = str(error)
            if problem:
                shutil.rmtree(target, ignore_errors=True)
                logger.error(
                    "checkpoint %s could not be written (%s): the one before it stays the last good one",
                    target.stem,
                    problem,
                )
        problem = from_main(problem)
        self.save_seconds = max(self.save_seconds, time.perf_counter() - self.started)
        return problem is None

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
            remove(replaced)
        saved = json.loads((final / "state.json").read_text())
        if saved.get("best") and saved["best"]["step"] == saved["step"]:
            write_atomically(self.folder / "best.json", json.dumps(saved["best"]))
        write_atomically(self.folder / "latest", final.name)
        is_free = self.mirror.wait(COPY_SECONDS)  # before older ones go: it may be reading one
        prune(self.folder, self.config, but=self.mirror.copying)
        if is_free:
            self.mirror.start(final)
        logger.info(
            "checkpoint %s: %.1f MB, training held up %.2f s, written in %.2f s",
            final,
            sum(fact["size"] for fact in files.values()) / 1e6,
            self.blocked_seconds,
            time.perf_counter() - self.started,
        )

    def close(self, *, hurry: bool = False) -> bool:
        """At the end. hurry: a time limit is near, which a copy must not make the job run into."""
        done = self.finish()
        if self.mirror.busy and self.mirror.copying is not None:
            logger.info("waiting for the copy of %s to %s", self.mirror.copying.name, self.config.copy_to)
        self.mirror.wait(COPY_SECONDS if hurry else LAST_COPY_SECONDS)
        return done

    def delete_after(self, step: int, best: dict | None) -> dict | None:
        """Remove what was saved after `step`, here and in `copy_to`: the run goes another way from there.
        Collective.

        best: the best score so far at `step`. Returns it; None where its own checkpoint has gone since, for a
        better one that goes now: the next score is then the best of those that are kept.
        """
        if self.ranks.is_main:
            self.mirror.wait(COPY_SECONDS)  # it may be copying what is deleted
            if best and self.config.keep_best and not (self.folder / f"step-{best['step']:06d}").exists():
                best = None
            delete_after(self.folder, step, best)
            self.mirror.delete_after(step, best)
        return from_main(best)

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
                if convert:
                    self._load_starts(engine.module, folder)
        except (
            _WRONG_CONTENT
        ) as error:  # its files have their hashes, so somebody else has written them like that
            if is_out_of_memory(error):
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

    def _load_starts(self, model: torch.nn.Module, folder: Path) -> None:
        """Read where LoRA started (model/lora_init.py), which DeepSpeed's universal format leaves out, from a
        checkpoint's own files; every rank's has all of it."""
        if own := starts(model):
            file = min(folder.glob("*mp_rank_00_model_states.pt"))
            state = torch.load(file, map_location="cpu", weights_only=True)["module"]
            for name, start in own.items():
                start.copy_(state[name])

    def load_average(self, average: WeightAverage | None, folder: Path) -> None:
        """Read this rank's averaged weights; without them (`optim.ema_decay` is new, and accepted) the
        average starts with the checkpoint's weights. Errors: CheckpointError."""
        if average is None:
            return
        path = self._average_file(folder)
        if not path.exists():
            average.restart()
            if self.ranks.is_main:
                logger.info("%s has no averaged weights: the average starts with its weights", folder)
            return
        try:
            average.load(torch.load(path, map_location="cpu", weights_only=True))
        except _WRONG_CONTENT as error:
            raise CheckpointError(
                f"{path} cannot be loaded ({safe_load.reason(error)}): remove {folder} to resume from the "
                "one before it, or choose another output folder"
            ) from error
