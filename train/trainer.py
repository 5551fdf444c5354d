"""Train one stage: the loop over steps, validation, checkpoints, roll-back, and the ways in which a run ends.

Read `Trainer.train` first. train/setup.py makes a Trainer, train/stage_run.py is the whole run of a stage.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from safetensors import SafetensorError

from core.console import one_line
from core.distributed import Ranks, gather
from core.memory import is_out_of_memory
from model import artifact
from model.batch import Batch
from model.language_model import lora_parameters
from recipe.config import Recipe, RecipeError
from recipe.stages import stage_folder, stage_of
from stream import Plan, StepBatches, Stream, StreamStalled, sample_log, worst_case_batch
from stream.unindexed import UnindexedPlan
from train import desync
from train.checkpoint.store import Checkpoints
from train.checkpoint.verification import find_good, read_state, saved_in_health
from train.engine import Engine, StepResult
from train.health import SkippedSteps
from train.outcome import RunOutcome, RunStatus
from train.preemption import FAILED, WRONG_INPUT, Preemption
from train.profiling import Profiler
from train.step_counts import StepCounts, StepFlags, StreamSums
from train.telemetry import Meter, Telemetry
from train.trackers import tracker_names
from train.validate import (
    RATES,
    ValidationSet,
    chosen_by,
    clip_mel,
    is_better,
    score_label,
    score_text,
    validate,
)

logger = logging.getLogger("soundwave")

BEST = "model-best"  # the folder of the best model so far
PLAIN = "model-plain"  # beside an averaged `model`: the last step's weights


@dataclass
class Progress:
    """Where a run stands."""

    step: int = 0  # the next one to do
    data_offset: int = 0  # steps of the plan that roll-backs have skipped
    best: dict | None = None  # the best validation: step, score, by, loss
    without_better: int = 0  # validations since the best
    equal_at: int | None = None  # the last step at which the ranks were found equal
    # Utterances of all ranks, and clocks, since the start of this process.
    rejected: int = 0
    samples: int = 0
    saved_at: float = dataclasses.field(default_factory=time.monotonic)
    step_seconds: float = 0.0


@dataclass
class Taken:
    """What this rank got from the stream for a step, or why it got nothing."""

    data_step: int | None
    micro_batches: list[Batch]
    streamed: StreamSums
    seconds: float  # waited
    problem: Exception | None = None


def best_at(state: dict, best_by: str) -> dict | None:
    """Return the best validation at a checkpoint; None where another score than the recipe's chose it."""
    best = state["best"]
    return best if best and best.get("asked", best.get("by", "wer")) == best_by else None


class Trainer:
    """One process's part in training one stage, ready for its first step (train/setup.py)."""

    def __init__(
        self,
        recipe: Recipe,
        ranks: Ranks,
        *,
        plan: Plan | UnindexedPlan,
        row_limit: int | None,
        engine: Engine,
        checkpoints: Checkpoints,
        validation: ValidationSet,
        topology: dict,
        facts: dict,
        progress: Progress,
        status: RunStatus,
        preemption: Preemption,
        profile_steps: int = 0,
        sharding: object | None = None,
    ):
        """facts: what a checkpoint belongs to (train/checkpoint/compatibility.py); topology: ranks and ZeRO
        stage; sharding: keeps transformers sharding what it loads, as long as it lives
        (train/deepspeed_fixes/zero3.py).
        """
        self.recipe, self.ranks, self.stage = recipe, ranks, stage_of(recipe)
        self.folder = stage_folder(recipe)
        self.plan, self.row_limit, self.validation = plan, row_limit, validation
        self.engine, self.model, self.checkpoints = engine, engine.model, checkpoints
        self.topology, self.facts, self.progress = topology, facts, progress
        self.status, self.preemption, self.sharding = status, preemption, sharding
        self.skipped_steps = SkippedSteps(self.folder, ranks)
        self.meter = Meter(self.model, ranks)
        self.profiler = Profiler(self.folder, profile_steps if ranks.is_main else 0)
        self.log = Telemetry(
            self.folder,
            ranks,
            first_step=progress.step,
            steps=recipe.optim.total_steps,
            stage=f"stage {self.stage.number}",
            trackers=tracker_names(recipe.log),
            settings=dataclasses.asdict(recipe),
        )

    # ---- the loop

    def train(self) -> RunOutcome:
        """Train up to the last step, or to another end. Collective."""
        recipe, at = self.recipe, self.progress
        self._before_the_first_step()
        stream, batches = self._open_stream()
        while at.step < recipe.optim.total_steps and not self._stops_early():
            began = time.perf_counter()
            taken = self._take(batches)
            stop_reason = self.preemption.stop_reason(self.checkpoints.save_seconds, at.step_seconds)
            counts = self._reduce_counts(taken, stop_reason)
            data_failed = bool(counts.flags.data_failed)
            if not data_failed:
                taken.problem = stream.rejected.too_many(at.rejected, at.samples)
                data_failed = taken.problem is not None
            if counts.flags.written == self.ranks.world_size:
                self.checkpoints.finish()
            if counts.flags.stop or data_failed:
                stream.close()
                is_saved = self._save() and self.checkpoints.finish()
                if data_failed:
                    return self._end_by_data(taken.problem, is_saved)
                return self._end_by_preemption(stop_reason, is_saved)

            result = self.engine.step(at.step, taken.micro_batches, counts)
            self._after_step(result, counts, taken, began)

            if self.engine.health.must_roll_back:
                stream.close()
                if not self._roll_back():
                    return self._end_by_health()
                stream, batches = self._open_stream()
                continue
            if difference := self._difference_of_ranks():
                stream.close()
                return self._end_by_divergence(difference)
            is_last = at.step == recipe.optim.total_steps
            has_improved = self._validate_if_due(is_last)
            is_due = at.step % recipe.checkpoint.every_steps == 0
            if counts.flags.save or has_improved or is_last or is_due or self._stops_early():
                self._save()
                at.saved_at = time.monotonic()
        stream.close()
        return self._end_by_last_step()

    def close(self, outcome: RunOutcome) -> None:
        """Close files; wait for the checkpoint in progress and its copy (shortly, where a time limit is
        near)."""
        self.log.close(hurry=outcome.status == "preempted")
        self.profiler.close()
        self.checkpoints.close(hurry=outcome.status == "preempted")

    # ---- parts of a step

    def _before_the_first_step(self) -> None:
        recipe = self.recipe
        self.status.write("running", step=self.progress.step)
        if self.ranks.is_main and recipe.log.sample_ids:
            sample_log.begin(self.folder, self.progress.step)
        try_largest = recipe.data.try_largest
        if try_largest if try_largest is not None else torch.cuda.is_available():
            self._probe_memory()
        if self.progress.step == 0 and self.validation and recipe.log.validate_at_start:
            self.validate()
        self.progress.saved_at = time.monotonic()

    def _open_stream(self) -> tuple[Stream, Iterator[StepBatches]]:
        recipe, at = self.recipe, self.progress
        stream = Stream(
            recipe.data,
            self.stage.name,
            self.model.tokenizer,
            recipe.model,
            self.ranks.rank,
            self.ranks.world_size,
            start_step=at.step + at.data_offset,
            steps=recipe.optim.total_steps + at.data_offset,
            rejected_path=self.folder / "rejected.jsonl",
            plan=self.plan,
            row_limit=self.row_limit,
        )
        return stream, iter(stream)

    def _take(self, batches: Iterator[StepBatches]) -> Taken:
        """Wait for the next step's micro-batches; a failure is kept for all ranks to end together."""
        began = time.perf_counter()
        try:
            batch = next(batches)
        except (RecipeError, StreamStalled) as error:
            return Taken(None, [], StreamSums(), time.perf_counter() - began, error)
        return Taken(batch.step, batch.micro_batches, StreamSums.of(batch), time.perf_counter() - began)

    def _reduce_counts(self, taken: Taken, stop_reason: str | None) -> StepCounts:
        at = self.progress
        is_overdue = time.monotonic() - at.saved_at > 60 * self.recipe.checkpoint.every_minutes
        flags = StepFlags(
            stop=float(stop_reason is not None),
            written=float(self.checkpoints.written),
            save=float(self.ranks.is_main and is_overdue),
            data_failed=float(taken.problem is not None),
        )
        counts = self.engine.reduce_step_counts(taken.micro_batches, flags, taken.streamed)
        at.rejected += int(counts.streamed.rejected)
        at.samples += int(counts.streamed.samples)
        return counts

    def _after_step(self, result: StepResult, counts: StepCounts, taken: Taken, began: float) -> None:
        """Count the step and log it."""
        at = self.progress
        if self.recipe.log.sample_ids and taken.data_step is not None:
            sample_log.append(self.folder, at.step, taken.data_step, self.ranks.rank, taken.micro_batches)
        at.step += 1
        at.step_seconds = time.perf_counter() - began
        self.profiler.step()
        self.log_step(result, counts.streamed, taken.seconds, at.step_seconds)
        self.skipped_steps.add(result.step, result.step + at.data_offset, result.skipped, taken.micro_batches)

    def log_step(self, result: StepResult, streamed: StreamSums, waited: float, seconds: float) -> None:
        values: dict[str, Any] = {
            **self.meter.values(result, streamed, waited, seconds),
            "skipped_steps": self.engine.health.skipped,
        }
        if result.skipped:
            values["skipped"] = result.skipped
            if self.ranks.is_main:
                logger.warning("step %d is not applied: %s", result.step, result.skipped)
        is_due = (result.step + 1) % self.recipe.log.every_steps == 0
        passes = {}
        if is_due and self.ranks.is_main:
            passes = self.plan.passes(result.step + 1 + self.progress.data_offset)
        self.log.line("train", result.step, {**values, **({"passes": passes} if passes else {})})
        if is_due:
            self.log.scalars("train", result.step, {**values, **self.log.totals})
            self.log.scalars("passes", result.step, passes)
            self.status.write("running", step=result.step + 1)
        shown = {"loss": f"{result.loss:.4g}"}
        if best := self.progress.best:
            shown[f"best {score_label(best['by'])}"] = score_text(best["by"], best["score"])
        self.log.advance(shown)

    def _difference_of_ranks(self) -> str | None:
        """Compare the ranks' weights where that is due; return how they differ."""
        every, at = self.recipe.health.desync_every_steps, self.progress
        if every <= 0 or at.step % every != 0:
            return None
        difference = desync.difference(self.model, self.ranks)
        if difference is None:
            at.equal_at = at.step
        return difference

    def _probe_memory(self) -> None:
        """Forward and backward of the largest micro-batch that the recipe allows. Errors: RecipeError where
        memory runs out."""
        data, began = self.recipe.data, time.perf_counter()
        audio = (
            "data.micro_batch_seconds" if data.micro_batch_seconds > data.max_seconds else "data.max_seconds"
        )
        keys = ["data.micro_batch_tokens", audio] if self.stage.needs_llm else [audio]
        try:
            batch = worst_case_batch(data, self.stage.name, self.model.tokenizer, self.recipe.model)
            self.engine.probe_memory(batch)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            settings = " or ".join(f"{key}={getattr(data, key.removeprefix('data.')):g}" for key in keys)
            raise RecipeError(
                "the largest micro-batch that the recipe allows does not fit into memory: lower "
                f"{settings} ({one_line(error)})"
            ) from None
        if self.ranks.is_main:
            peak = ""
            if torch.cuda.is_available():
                peak = f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB at most"
            seconds = time.perf_counter() - began
            logger.info("the largest micro-batch of the recipe fits (%.1f s%s)", seconds, peak)

    # ---- validation

    def _validate_if_due(self, is_last: bool) -> bool:
        """Validate, and write the best model so far; return whether this is it."""
        is_due = self.progress.step % self.recipe.log.validate_every_steps == 0
        if not self.validation or not (is_due or is_last):
            return False
        has_improved = self.validate()
        if has_improved:
            with self.engine.averaged():
                self.save_model(BEST)
        return has_improved

    def validate(self) -> bool:
        """Validate and log; return whether this is the best so far and such models are kept.

        The same on all ranks: the score is a global number.
        """
        at = self.progress
        with self.engine.averaged():
            result = validate(self.engine, self.validation, self.model.tokenizer, self.ranks)
        self._log_validation(result)
        requested = self.recipe.checkpoint.best_by
        by = chosen_by(result, requested)
        if by != requested and self.ranks.is_main:
            logger.warning(
                "step %d: data.valid gives no %s: the best model is chosen by loss",
                at.step,
                requested,
            )
        candidate = {
            "step": at.step,
            "by": by,
            "score": result[by],
            "loss": result["loss"],
            **({"asked": requested} if by != requested else {}),
        }
        if at.step == 0:
            return False
        if is_better(candidate, at.best):
            at.best, at.without_better = candidate, 0
            return self.recipe.checkpoint.keep_best
        at.without_better += 1
        return False

    def _stops_early(self) -> bool:
        """Whether `optim.stop_after` validations have brought no better score."""
        limit = self.recipe.optim.stop_after
        return limit is not None and self.progress.without_better >= limit

    def _log_validation(self, result: dict) -> None:
        step = self.progress.step
        samples, clip, table = result.pop("samples"), result.pop("clip"), result.pop("language_table", "")
        self.log.line("valid", step, {**result, "samples": samples[:8]})
        if clip:
            inspection, reference, hypothesis = clip
            if inspection["mel"][0] is None and self.ranks.is_main:  # cached features
                inspection["mel"][0] = self._clip_mel
            reference, hypothesis = (" ".join(text.split()) for text in (reference, hypothesis))
            self.log.picture(
                step,
                inspection,
                f"step {step}, reference: {reference}\nhypothesis: {hypothesis}",
                lambda tokens: str(self.model.tokenizer.decode(tokens)),
            )
        self.log.scalars("valid", step, result)
        if samples:
            self.log.table("valid/samples", step, ["reference", "hypothesis"], [list(s) for s in samples[:8]])
        if self.ranks.is_main:
            names = [name for name in (*RATES, self.recipe.checkpoint.best_by, "loss") if name in result]
            averaged = " (averaged weights)" if self.engine.average is not None else ""
            scores = ", ".join(
                f"{score_label(name)} {score_text(name, result[name])}" for name in dict.fromkeys(names)
            )
            logger.info("step %d: validation%s %s", step, averaged, scores)
            if table:
                logger.info("step %d: validation by language\n%s", step, table)

    @functools.cached_property
    def _clip_mel(self) -> torch.Tensor | None:
        tokenizer, audio_id = self.model.tokenizer, self.model.audio_id
        return clip_mel(self.recipe, self.stage, tokenizer, self.ranks, self.validation, audio_id)

    # ---- saving and rolling back

    def _save(self) -> bool:
        """Start writing a checkpoint of the next step to do."""
        at = self.progress
        state = {
            "step": at.step,
            "data_offset": at.data_offset,
            "best": at.best,
            "without_better": at.without_better,
            "health": self.engine.health.state(),
            "topology": self.topology,
            "seed": self.recipe.seed,
            "facts": self.facts,
        }
        average = self.engine.average
        return self.checkpoints.save(
            self.engine.deepspeed, state, average.state() if average is not None else None
        )

    def save_model(self, name: str) -> None:
        """Write <stage folder>/<name>, a model folder, gathered from all ranks, atomically.

        The best so far is a convenience: where there is no room for it, training continues.
        """
        llm = self.model.llm
        tensors = list(artifact.trained_tensors(self.model).values())
        tensors += [parameter for _, parameter in lora_parameters(llm)] if llm is not None else []
        parameters = [p for p in tensors if hasattr(p, "ds_id")]
        tuned = self._gathered(artifact.tuned_tensors(self.model))
        with deepspeed.zero.GatheredParameters(parameters, enabled=self.engine.zero_stage == 3):
            if self.ranks.is_main:
                extra = {
                    "step": self.progress.step,
                    "best": self.progress.best,
                    "stopped_after": self.recipe.optim.stop_after if self._stops_early() else None,
                    "recipe": dataclasses.asdict(self.recipe),
                    "tokenizer": self.facts["tokenizer"],
                    "index": self.facts["index"],
                    "code": self.facts["code"],
                    "start": self.facts["base"]["start"],
                }
                try:
                    artifact.save(self.model, self.folder / name, extra=extra, tuned=tuned)
                except (OSError, SafetensorError) as error:
                    if name != BEST:
                        raise
                    shutil.rmtree(self.folder / f"{name}.partial", ignore_errors=True)
                    logger.error(
                        "step %d: %s could not be written (%s); training continues",
                        self.progress.step,
                        self.folder / name,
                        error,
                    )
        dist.barrier()

    def _gathered(self, tensors: dict[str, dict[str, torch.Tensor]]) -> dict[str, dict[str, torch.Tensor]]:
        """Copy tensors by part and name to rank 0's host memory, one at a time: an LLM that is trained whole
        need not fit on a GPU beside its shards."""
        gathered: dict[str, dict[str, torch.Tensor]] = {part: {} for part in tensors}
        for part, named in tensors.items():
            for name, parameter in named.items():
                with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
                    if self.ranks.is_main:
                        gathered[part][name] = parameter.detach().to("cpu", copy=True)
        return gathered

    def _roll_back(self) -> bool:
        """Return to the last checkpoint from before the skipped steps, and skip their data (as for PaLM after
        spikes: Chowdhery et al., 2022, section 5.1). False where roll-backs are used up or nothing is
        left."""
        health, at, limit = self.engine.health, self.progress, self.recipe.health.max_rollbacks
        if health.rollbacks >= limit:
            return False
        self.checkpoints.finish()
        source = find_good([self.checkpoints.folder], self.ranks, among=saved_in_health)
        if source is None:
            return False
        state, from_step = read_state(source), at.step
        self.checkpoints.load(self.engine.deepspeed, source, state["topology"], self.topology)
        self.checkpoints.load_average(self.engine.average, source)
        health.load({**state["health"], "skipped": health.skipped, "rollbacks": health.rollbacks + 1})
        at.step = state["step"]
        at.data_offset += from_step - at.step
        at.best = self.checkpoints.delete_after(at.step, best_at(state, self.recipe.checkpoint.best_by))
        at.without_better = state.get("without_better", 0)
        best = self.folder / BEST
        if self.ranks.is_main and best.exists() and artifact.describe(best)["step"] > at.step:
            shutil.rmtree(best)
        self.log.go_back(at.step)
        event = {"event": "roll_back", "from_step": from_step, "data_offset": at.data_offset}
        self.log.line("event", at.step, event)
        if self.ranks.is_main:
            logger.warning(
                "roll-back %d of %d: %s; resuming from %s with the data after the bad stretch",
                health.rollbacks,
                limit,
                self.skipped_steps,
                source,
            )
        self.skipped_steps.steps.clear()
        return True

    # ---- ends

    def _end_by_last_step(self) -> RunOutcome:
        step, folder = self.progress.step, self.folder / "model"
        is_saved = self.checkpoints.finish()
        # Whatever became of the checkpoint: what was trained is only in memory.
        if self.engine.average is not None:
            self.save_model(PLAIN)
        with self.engine.averaged():
            self.save_model("model")
        if self.engine.average is not None and self.ranks.is_main:
            logger.info("%s holds the averaged weights, %s the last step's", folder, self.folder / PLAIN)
        if self.ranks.is_main:
            logger.info("stage %s is done: %s", self.stage.number, folder)
        if not is_saved:
            return self._fail(
                f"the checkpoint of the last step, {step}, could not be written; the model could: {folder}"
            )
        reason = None
        if step < self.recipe.optim.total_steps and self.progress.best:
            best = self.progress.best
            reason = (
                f"stopped at step {step}: {self.progress.without_better} validations without a better "
                f"{score_label(best['by'])} than {score_text(best['by'], best['score'])} of step "
                f"{best['step']} (optim.stop_after); the best model: {self.folder / BEST}"
            )
            if self.ranks.is_main:
                logger.info("%s", reason)
        return RunOutcome.done(step, reason)

    def _end_by_preemption(self, stop_reason: str | None, is_saved: bool) -> RunOutcome:
        step, reasons = self.progress.step, gather(stop_reason)
        why = "; ".join(f"{reason} on rank {rank}" for rank, reason in enumerate(reasons) if reason)
        outcome = RunOutcome.preempted(step, why) if is_saved else RunOutcome.failed(step, why)
        if self.ranks.is_main:
            self.preemption.stop_file.unlink(missing_ok=True)
            logger.info(
                "stopped before step %d (%s), %s; the same command resumes from there",
                step,
                why,
                f"saved, exit code {outcome.code}" if is_saved else "NOT saved",
            )
        return outcome

    def _end_by_data(self, problem: Exception | None, is_saved: bool) -> RunOutcome:
        problems = gather((type(problem).__name__, str(problem)) if problem else None)
        rank, (kind, text) = next((r, p) for r, p in enumerate(problems) if p)
        weights = "saved" if is_saved else "NOT saved"
        return self._fail(
            f"stopped before step {self.progress.step}, weights {weights}; data on rank {rank}: {text}",
            FAILED if kind == StreamStalled.__name__ else WRONG_INPUT,
        )

    def _end_by_health(self) -> RunOutcome:
        done = self.engine.health.rollbacks
        tried = "no checkpoint is older"
        if done >= self.recipe.health.max_rollbacks:
            tried = f"{done} roll-back(s) did not help"
        return self._fail(
            f"stopped before step {self.progress.step}: {self.skipped_steps}; {tried}: look at these "
            "utterances, lower the learning rates, or raise health.spike_sigma"
        )

    def _end_by_divergence(self, difference: str) -> RunOutcome:
        at = self.progress
        since = "no check before found them equal"
        if at.equal_at is not None:
            since = f"they were equal at step {at.equal_at}"
        return self._fail(
            f"stopped before step {at.step}: the ranks have diverged: {difference}; {since}: remove the "
            f"checkpoints made since from {self.checkpoints.folder}, look for a faulty device, and start "
            "the same command again"
        )

    def _fail(self, reason: str, code: int = FAILED) -> RunOutcome:
        self.checkpoints.finish()
        if self.ranks.is_main:
            logger.error("%s", reason)
        return RunOutcome.failed(self.progress.step, reason, code)
