"""One stage from its recipe to its model folder: load, resume, steps, validation, checkpoints, the finished
folder."""

from __future__ import annotations

import dataclasses
import json
import logging
import operator
import os
import shutil
import time
from pathlib import Path

import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from safetensors import SafetensorError

from core.ctc_text import NORMALISATIONS
from core.distributed import Ranks
from core.files import code_version, write_atomically
from model import folder as model_folder
from model import identity
from model.config import SoundwaveConfig
from model.inheritance import differing_options, inherited_options
from model.language_model import lora_parameters, resolved_targets
from model.ops.linear_ctc import check_implementation
from model.pretrained import locate, text_config
from model.rows import longest_row
from model.soundwave import Soundwave
from recipe.config import Recipe, RecipeError
from recipe.stages import Stage, check_trains_something, initial_folder, stage_folder, stage_of, trained_by
from stream import Plan, Stream, StreamStalled, augment, consumed, worst_case_batch
from stream.cache import Interrupted, ensure_features
from stream.plan import load_index
from stream.validation import select
from train import desync, report, resume, universal, zero
from train.checkpoint import Checkpoints, find_good, read_state, saved_in_health
from train.engine import Engine, StepResult
from train.health import BadStretch
from train.preemption import DONE, FAILED, PREEMPTED, WRONG_INPUT, Preemption
from train.profiling import Profiler
from train.telemetry import Meter, StreamSums, Telemetry
from train.validate import RATES, SCORES, chosen_by, is_better, validate, validation_set

logger = logging.getLogger("soundwave")

BEST = "model-best"  # the folder of the best model on the way


def check(recipe: Recipe) -> None:
    """What can be known without weights or data. Errors: RecipeError."""
    stage_of(recipe)
    check_trains_something(recipe)
    if recipe.checkpoint.best_by not in SCORES:
        raise RecipeError(
            f"checkpoint.best_by: '{recipe.checkpoint.best_by}' is not one of {', '.join(SCORES)}"
        )
    zero.resolve(recipe, hidden_size=1024)
    augment.check(recipe.data)
    if recipe.data.ctc_text not in NORMALISATIONS:
        raise RecipeError(
            f"data.ctc_text: '{recipe.data.ctc_text}' is not one of {', '.join(NORMALISATIONS)}"
        )
    if not recipe.data.train:
        raise RecipeError(
            "data.train is empty: name at least one packed folder, e.g. data.train=[{shards: data/train}]"
        )


def warnings_of(recipe: Recipe) -> list[str]:
    """What is legal and seldom meant."""
    optim = recipe.optim
    if optim.warmup_steps < optim.steps or optim.warmup_steps == 0:
        return []
    return [
        f"optim.warmup_steps={optim.warmup_steps} is not below optim.steps={optim.steps}: the learning rate "
        f"rises to "
        f"{optim.steps / optim.warmup_steps:.0%} of its peak in the last step and never falls"
    ]


class Run:
    """One process's part in training one stage."""

    def __init__(self, recipe: Recipe, ranks: Ranks, profile_steps: int = 0):
        self.recipe, self.ranks, self.profile_steps = recipe, ranks, profile_steps
        self.stage: Stage = stage_of(recipe)
        self.folder: Path = stage_folder(recipe)
        self.status: dict = {
            "stage": self.stage.name,
            "steps": recipe.optim.steps,
            "world_size": ranks.world_size,
            "started": time.time(),
            "host": os.uname().nodename,
            "pid": os.getpid(),
            "commit": code_version() if ranks.is_main else None,
        }

    def note(self, status: str, **values) -> None:
        """run.json: what `python -m train.status` reads, from files alone."""
        if self.ranks.is_main:
            self.status.update(status=status, updated=time.time(), **values)
            try:
                write_atomically(self.folder / "run.json", json.dumps(self.status, indent=1))
            except OSError as error:  # a full disk must not end what is in memory alone
                logger.error("run.json does not say '%s': %s", status, error)

    def execute(self) -> int:
        """Train the stage; returns the exit code (train/preemption.py)."""
        other, is_finished, problem = self._look()
        if other or problem:  # run.json stays as it is: the other process's, or the finished stage's
            if self.ranks.is_main:
                logger.error(
                    "%s",
                    problem
                    or f"process {other} of this machine is training {self.folder}: wait for it, end "
                    "it, or "
                    "choose another output",
                )
            return WRONG_INPUT
        if is_finished:
            if self.ranks.is_main:
                logger.info(
                    "stage %s is finished: %s; remove that folder or choose another output to train again",
                    self.stage.number,
                    self.folder / "model",
                )
            return DONE
        for line in warnings_of(self.recipe) if self.ranks.is_main else ():
            logger.warning("%s", line)
        self.note("starting")
        self.preemption = Preemption(self.folder)
        self.checkpoints = Checkpoints(self.folder / "checkpoints", self.recipe.checkpoint, self.ranks)
        try:
            self._load()
        except Interrupted as stop:
            return self._features_unfinished(str(stop))
        self.profiler = Profiler(self.folder, self.profile_steps if self.ranks.is_main else 0)
        code = self._train()
        self.profiler.close()
        self.checkpoints.close(hurry=code == PREEMPTED)
        if self.ranks.is_main:
            try:
                logger.info("report: %s", report.write(self.folder))
            except Exception:  # all is saved by now: a report that fails must not make the run fail
                logger.exception("no report was written; python -m train.report %s tries again", self.folder)
        return code

    # ---------------------------------------------------------------- start

    def _look(self) -> tuple[int | None, bool, str | None]:
        """(another process that trains the stage, whether it is finished, why its model is not this
        recipe's), by rank 0."""
        seen = [None]
        if self.ranks.is_main:
            other, is_finished, problem = trained_by(self.recipe), False, None
            try:
                is_finished = not other and resume.finished(self.recipe)
            except RecipeError as error:
                problem = str(error)
            seen = [(other, is_finished, problem)]
        dist.broadcast_object_list(seen, src=0)
        return seen[0]

    def _load(self) -> None:
        recipe, ranks = self.recipe, self.ranks
        copies = [Path(recipe.checkpoint.copy_to)] if recipe.checkpoint.copy_to else []
        source = find_good([self.checkpoints.folder, *copies], ranks)
        state = read_state(source) if source else None
        if state is not None:
            resume.check_steps(recipe, state["step"], source)
        start_from = initial_folder(recipe)
        self.plan = Plan.open(
            recipe.data, self.stage.name, recipe.optim.steps
        )  # wrong data is told before models are read
        for corpus in recipe.data.valid:
            select(load_index(corpus.shards), 0, self.stage.name, corpus, recipe.log.validate_utterances)
        llm = locate(recipe.model.llm.name, sizes_only=True)
        sizes = text_config(llm.config)
        self.ds_config = config = zero.resolve(recipe, sizes.hidden_size)
        self.row_limit = longest_row(sizes)
        if "lora" in self.stage.trains:
            recipe.model.llm.lora_targets = resolved_targets(
                recipe.model.llm, llm
            )  # recorded as what they are
        if state is not None:  # what can be refused is, before features are computed and models read
            now = {**state["facts"], "recipe": resume.recipe_facts(recipe), "index": self.plan.fingerprint}
            if "settings" in now:
                now["settings"] = resume.settings_here(recipe) or now["settings"]
            resume.check(state["facts"], now, recipe.checkpoint.accept_changes, source)
            universal.needed(state["topology"], self._topology(), source)
        if ranks.is_main:
            OmegaConf.save(OmegaConf.structured(recipe), self.folder / "recipe.yaml")
        ensure_features(
            recipe,
            rank=ranks.rank,
            world_size=ranks.world_size,  # before ZeRO-3 shards what is loaded
            wish=lambda seconds: self.preemption.wish(0.0, seconds),
        )
        if zero.stage_number(config) == 3:
            from transformers.integrations import HfDeepSpeedConfig

            self._shard_while_loading = HfDeepSpeedConfig(
                config
            )  # from_pretrained asks for it as long as it lives
        torch.manual_seed(recipe.seed)  # the same new adapters on every rank
        parts = tuple(p for p in self.stage.parts if p != "encoder" or not recipe.data.cache_features)
        try:
            check_implementation(recipe.model.ops.implementation, ranks.device.partition(":")[0])
        except ValueError as error:
            raise RecipeError(f"model.ops.implementation: {error}") from None
        self.model = model = Soundwave.build(recipe.model, parts=parts)
        facts = [None]
        if ranks.is_main:  # reads every byte of the frozen parts: once per machine room, not once per rank
            facts = [
                {
                    "base": model.frozen_hash(),
                    "start": resume.weights_hash(start_from) if start_from else None,
                }
            ]
        dist.broadcast_object_list(facts, src=0)
        model._hashes = facts[0]["base"]
        # A checkpoint holds what this stage trains; what earlier stages trained comes from their folder, on
        # resume too.
        if start_from is not None:
            notes = self._check_base(start_from)
            model_folder.load_trained(model, start_from, verify=False)
            for line in [*notes, *self._accepted_options(start_from)] if ranks.is_main else ():
                logger.warning("%s", line)
        model.set_stage(self.stage.name)
        self.facts = {
            "base": {**facts[0]["base"], "start": facts[0]["start"]},
            "settings": model.frozen_settings(),
            "tokenizer": identity.vocabulary_hash(model.tokenizer),
            "recipe": resume.recipe_facts(recipe),
            "index": self.plan.fingerprint,
            "code": resume.code_fingerprint(recipe.plugins),
        }
        self._same_on_all_ranks()
        self.first_step, self.data_offset, self.best = 0, 0, None
        self.bad_stretch = BadStretch(self.folder, ranks)
        self.agreed_at = None  # the last step at which the ranks were found equal
        if state is not None:
            for note in resume.check(state["facts"], self.facts, recipe.checkpoint.accept_changes, source):
                if ranks.is_main:
                    logger.warning("%s", note)
        self.engine = Engine(model, recipe, self.stage, config, ranks)
        if state is not None:
            self._restore(source, state)
        self.validation = validation_set(recipe, self.stage, model.tokenizer, ranks)
        if ranks.is_main:
            trained = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad)
            logger.info(
                "stage %s (%s): %.1fM parameters trained, ZeRO-%d, %d rank(s), %d thread(s) each, steps %d "
                "to %d",
                self.stage.number,
                self.stage.name,
                trained / 1e6,
                zero.stage_number(config),
                ranks.world_size,
                torch.get_num_threads(),
                self.first_step,
                recipe.optim.steps,
            )

    def _check_base(self, folder: Path) -> list[str]:
        """Compare the frozen parts with those of the start folder: lines about accepted differences. Errors:
        RecipeError."""
        accepted, notes = self.recipe.checkpoint.accept_changes, []
        for kind, text in model_folder.base_differences(self.model, folder).items():
            if kind not in accepted:
                raise RecipeError(
                    f"{text}, or accept it with checkpoint.accept_changes=[{','.join([*accepted, kind])}]"
                )
            notes.append(f"{kind} has changed and is accepted: {text}")
        return notes

    def _accepted_options(self, folder: Path) -> list[str]:
        """Lines about model options that differ from the start folder's; info about those that are the
        folder's."""
        config = self.recipe.model
        taken = {
            f"model.{key}": value
            for key, value in inherited_options(folder).items()
            if operator.attrgetter(key)(config) == value != operator.attrgetter(key)(SoundwaveConfig())
        }
        if self.ranks.is_main:
            logger.info(
                "starting from %s%s", folder, "".join(f", {key}={value}" for key, value in taken.items())
            )
        return [
            f"{key} was {then} when {folder} was trained, and is {now} here (init_accept)"
            for key, (then, now) in differing_options(config, folder).items()
        ]

    def _same_on_all_ranks(self) -> None:
        """Errors: RecipeError where nodes read different files: code, recipe, tokenizer or index."""
        found = [None] * self.ranks.world_size
        dist.all_gather_object(found, self.facts)
        for rank, facts in enumerate(found):
            kinds = [kind for kind in facts if facts[kind] != found[0][kind]]
            if kinds:
                raise RecipeError(
                    f"rank {rank} and rank 0 have different {' and '.join(kinds)}: all nodes must see the "
                    f"same "
                    "files; bring them up to date and start again"
                )

    def _restore(self, source: Path, state: dict) -> None:
        self.checkpoints.load(self.engine.deepspeed, source, state["topology"], self._topology())
        self.first_step, self.data_offset, self.best = (
            state["step"],
            state["data_offset"],
            self._best_of(state),
        )
        self.engine.health.load(state["health"])
        if self.ranks.is_main:
            logger.info("resuming at step %d from %s", self.first_step, source)

    def _best_of(self, state: dict) -> dict | None:
        """The best so far at a checkpoint; None where it was chosen by another score than the recipe's
        now."""
        best = state["best"]
        return (
            best
            if best and best.get("asked", best.get("by", "wer")) == self.recipe.checkpoint.best_by
            else None
        )

    def _topology(self) -> dict:
        return {"world_size": self.ranks.world_size, "zero_stage": zero.stage_number(self.ds_config)}

    def _state(self, step: int) -> dict:
        """What goes into a checkpoint beside DeepSpeed's files; `step` is the next one to do."""
        return {
            "step": step,
            "data_offset": self.data_offset,
            "best": self.best,
            "health": self.engine.health.state(),
            "topology": self._topology(),
            "seed": self.recipe.seed,
            "facts": self.facts,
        }

    def _try_largest(self) -> None:
        """Forward and backward of the largest micro-batch that the recipe allows. Errors: RecipeError where
        memory runs out."""
        data, begun = self.recipe.data, time.perf_counter()
        audio = (
            "data.micro_batch_seconds" if data.micro_batch_seconds > data.max_seconds else "data.max_seconds"
        )
        keys = [audio] if self.stage.name == "alignment" else ["data.micro_batch_tokens", audio]
        try:
            self.engine.rehearse(
                worst_case_batch(data, self.stage.name, self.model.tokenizer, self.recipe.model)
            )
        except RuntimeError as error:  # of CPU memory, PyTorch has no type of its own
            if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
                raise
            settings = " or ".join(f"{key}={getattr(data, key.removeprefix('data.')):g}" for key in keys)
            raise RecipeError(
                "the largest micro-batch that the recipe allows does not fit into memory: lower "
                f"{settings} ({str(error).splitlines()[0]})"
            ) from None
        if self.ranks.is_main:
            peak = (
                f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB at most"
                if torch.cuda.is_available()
                else ""
            )
            logger.info(
                "the largest micro-batch of the recipe fits (%.1f s%s)", time.perf_counter() - begun, peak
            )

    # ---------------------------------------------------------------- steps

    def _stream(self, first_step: int) -> Stream:
        recipe = self.recipe
        return Stream(
            recipe.data,
            self.stage.name,
            self.model.tokenizer,
            recipe.model,
            self.ranks.rank,
            self.ranks.world_size,
            start_step=first_step + self.data_offset,
            steps=recipe.optim.steps + self.data_offset,
            rejected_path=self.folder / "rejected.jsonl",
            plan=self.plan,
            row_limit=self.row_limit,
        )

    def _train(self) -> int:
        recipe, ranks = self.recipe, self.ranks
        log = Telemetry(
            self.folder,
            ranks,
            first_step=self.first_step,
            steps=recipe.optim.steps,
            stage=f"stage {self.stage.number}",
            tensorboard=recipe.log.tensorboard,
        )
        self.log, self.meter = log, Meter(self.model, ranks)
        self.note("running", step=self.first_step)
        if ranks.is_main and recipe.log.sample_ids:
            consumed.begin(self.folder, self.first_step)
        if recipe.data.try_largest if recipe.data.try_largest is not None else torch.cuda.is_available():
            self._try_largest()
        rejected, samples = 0, 0  # utterances of all ranks since the start of this process
        saved_at, step_seconds = time.monotonic(), 0.0
        step, stream = self.first_step, self._stream(self.first_step)
        batches = iter(stream)
        if step == 0 and self.validation and recipe.log.validate_at_start:
            self._validate(0)
        while step < recipe.optim.steps:
            begun = time.perf_counter()
            problem, batch, micro_batches = None, None, []
            try:
                batch = next(batches)
                micro_batches = batch.micro_batches
            except (RecipeError, StreamStalled) as error:
                problem = error
            waited = time.perf_counter() - begun
            wish = self.preemption.wish(self.checkpoints.save_seconds, step_seconds)
            overdue = ranks.is_main and time.monotonic() - saved_at > 60 * recipe.checkpoint.every_minutes
            ce_count, ctc_count, (stop, written, save_now, broken, *streamed) = self.engine.agree(
                micro_batches,
                [
                    float(wish is not None),
                    float(self.checkpoints.written),
                    float(overdue),
                    float(problem is not None),
                    *StreamSums.of(batch),
                ],
            )
            streamed = StreamSums(*streamed)
            rejected, samples = rejected + int(streamed.rejected), samples + int(streamed.samples)
            if not broken and (problem := stream.rejected.too_many(rejected, samples)):
                broken = 1.0
            if written == ranks.world_size:
                self.checkpoints.finish()
            if stop or broken:
                stream.close()
                saved = (
                    self.checkpoints.save(self.engine.deepspeed, self._state(step))
                    and self.checkpoints.finish()
                )
                if broken:
                    return self._data_failed(step, problem, saved)
                return self._preempted(step, wish, saved)
            result = self.engine.step(step, micro_batches, ce_count, ctc_count)
            if recipe.log.sample_ids:
                consumed.note(self.folder, step, batch.step, ranks.rank, micro_batches)
            step += 1
            step_seconds = time.perf_counter() - begun
            self.profiler.step()
            self._tell(result, streamed, waited, step_seconds)
            self.bad_stretch.note(step - 1, step - 1 + self.data_offset, result.skipped, micro_batches)
            if self.engine.health.must_roll_back:
                stream.close()
                back_to = self._roll_back(step)
                if back_to is None:
                    return self._unhealthy(step)
                step, stream = back_to, self._stream(back_to)
                batches = iter(stream)
                continue
            check_every = recipe.health.desync_every_steps
            if check_every > 0 and step % check_every == 0:
                apart = desync.difference(self.model, ranks)
                if apart:
                    stream.close()
                    return self._apart(step, apart)
                self.agreed_at = step
            last = step == recipe.optim.steps
            improved = False
            if self.validation and (step % recipe.log.validate_every_steps == 0 or last):
                improved = self._validate(step)
                if improved:
                    self._save_model(step, BEST)
            if save_now or improved or last or step % recipe.checkpoint.every_steps == 0:
                self.checkpoints.save(self.engine.deepspeed, self._state(step))
                saved_at = time.monotonic()
        stream.close()
        saved = self.checkpoints.finish()
        self._save_model(
            step, "model"
        )  # whatever became of the checkpoint: what was trained is in memory, and there only
        if ranks.is_main:
            logger.info("stage %s is done: %s", self.stage.number, self.folder / "model")
        if not saved:
            return self._stopped(
                step,
                f"the checkpoint of the last step, {step}, could not be written; the model could: "
                f"{self.folder / 'model'}",
                FAILED,
            )
        log.close()
        self.note("done", step=step, exit_code=DONE)
        return DONE

    def _features_unfinished(self, why: str) -> int:
        if self.ranks.is_main:
            self.preemption.stop_file.unlink(missing_ok=True)
            logger.info(
                "stopped while encoder features were computed (%s), exit code %d; the same command goes on "
                "from there",
                why,
                PREEMPTED,
            )
        self.note("preempted", reason=why, exit_code=PREEMPTED)
        return PREEMPTED

    def _preempted(self, step: int, wish: str | None, saved: bool) -> int:
        reasons = [None] * self.ranks.world_size
        dist.all_gather_object(reasons, wish)
        why = "; ".join(f"{reason} on rank {rank}" for rank, reason in enumerate(reasons) if reason)
        self.log.close()
        code = PREEMPTED if saved else FAILED
        if self.ranks.is_main:
            self.preemption.stop_file.unlink(missing_ok=True)
            logger.info(
                "stopped before step %d (%s), %s; the same command goes on from there",
                step,
                why,
                f"saved, exit code {code}" if saved else "NOT saved",
            )
        self.note("preempted" if saved else "failed", step=step, reason=why, exit_code=code)
        return code

    def _data_failed(self, step: int, problem: Exception | None, saved: bool) -> int:
        problems = [None] * self.ranks.world_size
        dist.all_gather_object(problems, (type(problem).__name__, str(problem)) if problem else None)
        rank, (kind, text) = next((r, p) for r, p in enumerate(problems) if p)
        weights = "saved" if saved else "NOT saved"
        return self._stopped(
            step,
            f"stopped before step {step}, weights {weights}; data on rank {rank}: {text}",
            FAILED if kind == StreamStalled.__name__ else WRONG_INPUT,
        )

    def _roll_back(self, step: int) -> int | None:
        """Back to the last checkpoint from before the bad stretch; the data goes on behind it (as for PaLM
        after spikes: Chowdhery et al., 2022, section 5.1). Returns the step to go on with; None where that is
        used up or nothing is left."""
        health = self.engine.health
        if health.rollbacks >= self.recipe.health.max_rollbacks:
            return None
        self.checkpoints.finish()
        source = find_good([self.checkpoints.folder], self.ranks, among=saved_in_health)
        if source is None:
            return None
        state = read_state(source)
        self.checkpoints.load(self.engine.deepspeed, source, state["topology"], self._topology())
        health.load({**state["health"], "skipped": health.skipped, "rollbacks": health.rollbacks + 1})
        self.data_offset += step - state["step"]
        self.best = self.checkpoints.forget_after(state["step"], self._best_of(state))
        best = self.folder / BEST
        if self.ranks.is_main and best.exists() and model_folder.describe(best)["step"] > state["step"]:
            shutil.rmtree(best)  # the run goes another way from here
        self.log.go_back(state["step"])
        self.log.line(
            "event", state["step"], {"event": "roll_back", "from_step": step, "data_offset": self.data_offset}
        )
        if self.ranks.is_main:
            logger.warning(
                "roll-back %d of %d: %s; going on from %s with the data behind the bad stretch",
                health.rollbacks,
                self.recipe.health.max_rollbacks,
                self.bad_stretch,
                source,
            )
        self.bad_stretch.steps.clear()
        return state["step"]

    def _unhealthy(self, step: int) -> int:
        done = self.engine.health.rollbacks
        tried = (
            f"{done} roll-back(s) did not help"
            if done >= self.recipe.health.max_rollbacks
            else "no checkpoint is older"
        )
        return self._stopped(
            step,
            f"stopped before step {step}: {self.bad_stretch}; {tried}: look at these utterances, lower "
            "the learning rates, or raise health.spike_sigma",
            FAILED,
        )

    def _apart(self, step: int, difference: str) -> int:
        since = (
            f"they were equal at step {self.agreed_at}"
            if self.agreed_at is not None
            else "no check before found them equal"
        )
        return self._stopped(
            step,
            f"stopped before step {step}: the ranks have come apart: {difference}; {since}: remove the "
            f"checkpoints made since from {self.checkpoints.folder}, look for a faulty device, and start "
            "the same command again",
            FAILED,
        )

    def _stopped(self, step: int, text: str, code: int) -> int:
        self.checkpoints.finish()
        self.log.close()
        if self.ranks.is_main:
            logger.error("%s", text)
        self.note("failed", step=step, reason=text, exit_code=code)
        return code

    def _tell(self, result: StepResult, streamed: StreamSums, waited: float, seconds: float) -> None:
        values = {
            **self.meter.values(result, streamed, waited, seconds),
            "skipped_steps": self.engine.health.skipped,
        }
        if result.skipped:
            values["skipped"] = result.skipped
            if self.ranks.is_main:
                logger.warning("step %d is not applied: %s", result.step, result.skipped)
        told = (result.step + 1) % self.recipe.log.every_steps == 0
        passes = self.plan.passes(result.step + 1 + self.data_offset) if told and self.ranks.is_main else {}
        self.log.line("train", result.step, {**values, **({"passes": passes} if passes else {})})
        if told:
            self.log.scalars("train", result.step, {**values, **self.log.totals})
            self.log.scalars("passes", result.step, passes)
            self.note("running", step=result.step + 1)
        shown = {"loss": result.loss}
        if self.best:
            shown[f"best {self.best['by']}"] = self.best["score"]
        self.log.advance(shown)

    def _validate(self, step: int) -> bool:
        """Validate, tell, and say whether this is the best so far (alike on all ranks: the score is a global
        number)."""
        result = validate(self.engine, self.validation, self.model.tokenizer, self.ranks)
        samples, clip = result.pop("samples"), result.pop("clip")
        self.log.line("valid", step, {**result, "samples": samples[:8]})
        if clip:
            inspection, reference, hypothesis = clip
            self.log.picture(
                step,
                inspection,
                f"step {step}: {reference} → {hypothesis}",
                lambda token: self.model.tokenizer.decode([token]),
            )
        self.log.scalars("valid", step, result)
        if samples:
            self.log.text("valid/samples", step, "\n\n".join(f"**{r}** → {h}" for r, h in samples[:8]))
        if self.ranks.is_main:
            rates = [f"{name.upper()} {result[name]:.3f}" for name in RATES if name in result]
            logger.info("step %d: validation %s", step, ", ".join([*rates, f"loss {result['loss']:.3f}"]))
        asked = self.recipe.checkpoint.best_by
        by = chosen_by(result, asked)
        if by != asked and self.ranks.is_main:
            logger.warning(
                "step %d: data.valid holds no words, thus no %s: the best model is chosen by loss",
                step,
                asked,
            )
        found = {
            "step": step,
            "by": by,
            "score": result[by],
            "loss": result["loss"],
            **({"asked": asked} if by != asked else {}),
        }
        if step > 0 and is_better(found, self.best):
            self.best = found
            return self.recipe.checkpoint.keep_best
        return False

    # ---------------------------------------------------------------- end

    def _save_model(self, step: int, name: str) -> None:
        """Write <stage folder>/<name>, a model folder: gathered from all ranks, into a partial folder, then
        renamed. The best on the way is a convenience: where there is no room for it, training goes on."""
        import deepspeed

        kept = [
            *model_folder.trained_tensors(self.model).values(),
            *(p for _, p in (lora_parameters(self.model.llm) if self.model.llm is not None else [])),
        ]
        parameters = [p for p in kept if hasattr(p, "ds_id")]
        with deepspeed.zero.GatheredParameters(parameters, enabled=self.engine.zero_stage == 3):
            if self.ranks.is_main:
                extra = {
                    "step": step,
                    "best": self.best,
                    "recipe": dataclasses.asdict(self.recipe),
                    "tokenizer": self.facts["tokenizer"],
                    "index": self.facts["index"],
                    "code": self.facts["code"],
                    "start": self.facts["base"]["start"],
                }
                try:
                    model_folder.save(self.model, self.folder / name, extra=extra)
                except (OSError, SafetensorError) as error:
                    if name != BEST:
                        raise
                    shutil.rmtree(self.folder / f"{name}.partial", ignore_errors=True)
                    logger.error(
                        "step %d: %s could not be written (%s); training goes on",
                        step,
                        self.folder / name,
                        error,
                    )
        dist.barrier()
