"""Validation during training: the loss, and the scores of what the model writes, on the same utterances each
time: error rates, and those of the tasks' metrics (evaluation/metrics)."""

from __future__ import annotations

import logging
import math
from collections import Counter
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from core.console import one_line
from core.distributed import Ranks, from_main, gather
from core.languages import is_known
from core.samples import answer_of, transcript_of
from core.text import RATES, Unit, count_errors, says_nothing
from evaluation.metrics import METRICS, metric_of
from evaluation.metrics.accuracy import with_labels
from evaluation.metrics.translation import with_tokenizers
from model.batch import Batch
from model.config import SoundwaveConfig
from model.features import log_mel
from model.losses import LOSSES
from recipe.config import DataConfig, Recipe
from recipe.stages import Stage, losses_of
from stream import validation_samples, validation_stream
from stream.selection import share_of_each
from train.engine import Engine, weighted_sum
from train.language_scores import LanguageErrors, language_table
from train.step_counts import all_reduce

MAX_NEW_TOKENS = 128
#: Scores of every validation, the lower the better: error rates (core/text.py) and the loss.
SCORES = (*RATES, "loss")
logger = logging.getLogger("soundwave")


def word_errors(
    references: list[str], hypotheses: list[str], langs: list[str | None] | None = None, unit: Unit = "word"
) -> tuple[int, int]:
    """Return (errors, reference units), as evaluation counts them. Without `langs` the references' scripts
    decide what a word is; utterances whose reference says nothing are left out."""
    langs = langs or [None] * len(references)
    spoken = [i for i, reference in enumerate(references) if not says_nothing(reference)]
    counted = count_errors(
        [references[i] for i in spoken], [hypotheses[i] for i in spoken], [langs[i] for i in spoken], unit
    )
    return int(counted.errors.sum()), int(counted.units.sum())


def chosen_by(result: dict, requested: str) -> str:
    """Return the score by which a validation is compared: the one asked for, or the loss where the references
    hold no words."""
    return requested if requested in result else "loss"


def is_better(candidate: dict, best: dict | None) -> bool:
    """Return whether a validation {by, score, loss} beats the best so far; of equal scores the lower loss
    wins."""
    if not math.isfinite(candidate["score"]):
        return False
    if best is None or best.get("by", "wer") != candidate["by"]:
        return True
    sign = 1 if is_lower_better(candidate["by"]) else -1
    return (sign * candidate["score"], candidate["loss"]) < (sign * best["score"], best.get("loss", math.inf))


def is_lower_better(score: str) -> bool:
    """Return the direction of a score, or SET/SCORE: error rates and losses are better when lower."""
    name = score.rpartition("/")[2]
    if name in SCORES or name in LOSSES:
        return True
    return any(name in metric.lower_is_better for metric in METRICS.values())


def score_label(score: str) -> str:
    """Return the name of a score, or SET/SCORE, as the log shows it."""
    part, slash, name = score.rpartition("/")
    return f"{part}{slash}{name if name == 'loss' else name.upper()}"


def score_text(score: str, value: float) -> str:
    """Return a value of a score, or SET/SCORE, as the log shows it: shares in percent."""
    name = score.rpartition("/")[2]
    if name in RATES or any(name in metric.rates for metric in METRICS.values()):
        return f"{100 * value:.1f} %"
    return f"{value:.4g}"


def set_names(data: DataConfig) -> list[str]:
    """Return the names of the sets of data.valid, each once."""
    return list(dict.fromkeys(corpus.name for corpus in data.valid if corpus.name))


def scores_of(recipe: Recipe, stage: Stage) -> list[str]:
    """Return the scores by which the best model can be chosen: those of a set are named SET/SCORE."""
    names = [*SCORES, *losses_of(recipe)]
    if stage.score == "generate":
        names += [name for metric in METRICS.values() for name in metric.columns]
    names = list(dict.fromkeys(names))
    return names + [f"{part}/{name}" for part in set_names(recipe.data) for name in names]


class ValidationBatch(NamedTuple):
    """A batch with labels, and of its rows the references and the samples' JSON; prompts to be continued;
    the name of its set. One without references fills up a rank's share."""

    batch: Batch
    references: list[str]
    prompts: Batch | None = None
    samples: list[dict] | None = None
    part: str = ""


ValidationSet = list[ValidationBatch]


def validation_set(recipe: Recipe, stage: Stage, tokenizer, ranks: Ranks) -> ValidationSet:
    """This rank's share of data.valid, read once; the same number of batches on every rank."""
    entries: ValidationSet = []
    for name in dict.fromkeys(corpus.name or "" for corpus in recipe.data.valid):
        entries += _part_of(recipe, stage, tokenizer, ranks, name)
    unknown = Counter(
        lang for entry in entries for lang in entry.batch.languages if lang and not is_known(lang)
    )
    if unknown and ranks.is_main:
        logger.warning(
            "%d utterances of data.valid have a language that is not known (%s): their text is split into "
            "words by "
            "its script",
            unknown.total(),
            ", ".join(sorted(unknown)),
        )
    return entries


def _arguments(
    recipe: Recipe, stage: Stage, tokenizer, ranks: Ranks, name: str
) -> tuple[DataConfig, str, PreTrainedTokenizerBase, SoundwaveConfig, int, int, int]:
    """Return what the stream's validation functions take for one set of data.valid."""
    corpora = [corpus for corpus in recipe.data.valid if (corpus.name or "") == name]
    return (
        replace(recipe.data, valid=corpora),
        stage.name,
        tokenizer,
        recipe.model,
        ranks.rank,
        ranks.world_size,
        share_of_each(recipe.data, recipe.log.validate_utterances) * len(corpora),
    )


def _part_of(recipe: Recipe, stage: Stage, tokenizer, ranks: Ranks, name: str) -> ValidationSet:
    """This rank's share of one set of data.valid."""
    arguments = _arguments(recipe, stage, tokenizer, ranks, name)
    answer = transcript_of if stage.score == "ctc" else answer_of
    labelled = validation_samples(*arguments, answers=True)
    prompts = validation_samples(*arguments, answers=False) if stage.score != "ctc" else []
    return [
        ValidationBatch(
            batch,
            [answer(sample) or "" for sample in samples],
            prompts[number][0] if prompts else None,
            samples,
            name,
        )
        for number, (batch, samples) in enumerate(labelled)
    ]


def clip_mel(
    recipe: Recipe, stage: Stage, tokenizer, ranks: Ranks, batches: ValidationSet, audio_id: int
) -> torch.Tensor | None:
    """Return the log-mel spectrogram [bands, frames] of `fixed_clip`, from its audio: cached features have
    none. None where the audio cannot be decoded."""
    number, audio, row = fixed_clip(batches, audio_id)
    entry = batches[number]
    position = sum(other.part == entry.part for other in batches[:number])  # in its own set
    decoded = replace(recipe, data=replace(recipe.data, cache_features=None))
    arguments = _arguments(decoded, stage, tokenizer, ranks, entry.part)
    batch = validation_stream(*arguments, answers=True).read(position)
    if row < 0 or batch.waveforms is None or len(batch.audio_lengths) != len(entry.batch.audio_lengths):
        return None
    size = batch.audio_lengths[audio : audio + 1]
    return log_mel(batch.waveforms[audio : audio + 1, : int(size)], size, 80)[0][0]


def fixed_clip(batches: ValidationSet, audio_id: int) -> tuple[int, int, int]:
    """(batch, audio in it, row in it) of the clip that is drawn each time: of this rank's, one of median
    length. A rank without audio draws nothing, but computes along with the others: its first dummy."""
    clips = sorted(
        (int(length), number, audio)
        for number, entry in enumerate(batches)
        if not entry.batch.audio_is_dummy
        for audio, length in enumerate(entry.batch.audio_lengths.tolist())
    )
    if not clips:
        return 0, 0, -1
    _, number, audio = clips[len(clips) // 2]
    ids = batches[number].batch.input_ids
    per_row = (ids == audio_id).sum(1).cumsum(0) if ids.shape[1] else torch.arange(1, len(ids) + 1)
    return number, audio, int((per_row <= audio).sum())


def validate(engine: Engine, batches: ValidationSet, tokenizer, ranks: Ranks) -> dict[str, Any]:
    """{"loss", each loss by name, "wer", "cer", "mer", "words", the tasks' scores (bleu, accuracy ...), the
    same of each named set as "SET/wer", of each of several languages as "language/de/wer", "language_table":
    the latter as text, "samples": [(reference, hypothesis), ...], "clip": (inspection,
    reference, hypothesis) or None}; numbers over all ranks, samples and clip of this one. An error rate is
    missing where the references hold no words. A batch without references fills up a rank's share: computed,
    for the collectives of ZeRO-3, and not counted.
    """
    stage, model, names = engine.stage, engine.model, tuple(engine.losses)
    # Of each set: sum and count of each loss, then errors and units of each rate.
    parts = list(dict.fromkeys(entry.part for entry in batches))
    sums = {part: [0.0] * (2 * len(names) + 2 * len(RATES)) for part in parts}
    samples, written = [], []
    rows: list[tuple[str, dict]] = []
    by_language = LanguageErrors()
    with engine.whole_model() as synced:
        for entry in tqdm(batches, desc="validate", unit="batch", leave=False, disable=not ranks.is_main):
            batch, references = entry.batch.to(ranks.device), entry.references
            output = model(batch, losses=names)
            if stage.score == "ctc":
                hypotheses = model.ctc_greedy(batch)
            else:
                assert entry.prompts is not None
                ids = model.generate(
                    entry.prompts.to(ranks.device), max_new_tokens=MAX_NEW_TOKENS, synced_gpus=synced
                )
                hypotheses = [tokenizer.decode(row, skip_special_tokens=True) for row in ids]
            written.append(hypotheses)
            if references:
                local = [
                    number
                    for name in names
                    for number in (float(output.sums[name]), LOSSES[name].count(batch))
                ]
                local += [
                    number
                    for unit in RATES.values()
                    for number in word_errors(references, hypotheses, batch.languages, unit)
                ]
                sums[entry.part] = [a + b for a, b in zip(sums[entry.part], local, strict=True)]
                by_language.add(batch, references, hypotheses, all_tasks=stage.score == "ctc")
                samples += list(zip(references, hypotheses, strict=False))
                if stage.score == "generate":
                    rows += [(entry.part, row) for row in prediction_rows(entry.samples or [], hypotheses)]
        number, audio, row = fixed_clip(batches, model.audio_id)
        batch, references = batches[number].batch, batches[number].references
        alone = slice(audio, audio + 1)
        audios = {
            name: getattr(batch, name)[alone]
            for name in ("waveforms", "features")
            if getattr(batch, name) is not None
        }
        inspection = model.inspect(
            replace(batch, **audios, audio_lengths=batch.audio_lengths[alone]).to(ranks.device)
        )
        clip = (inspection, references[row], written[number][row]) if row >= 0 else None
    summed = all_reduce([number for part in parts for number in sums[part]], ranks)
    width = len(summed) // len(parts)
    by_part = {part: summed[at * width : (at + 1) * width] for at, part in enumerate(parts)}
    whole = [sum(column) for column in zip(*by_part.values(), strict=True)]
    task_scores = scores_by_task(rows, ranks) if stage.score == "generate" else {}
    result = {**_scores(whole, engine.losses), **task_scores.get(None, {})}
    for part in filter(None, parts):
        own = {**_scores(by_part[part], engine.losses), **task_scores.get(part, {})}
        result |= {f"{part}/{name}": value for name, value in own.items()}
    languages = by_language.total()
    result |= (scores := languages.scores())
    table = language_table(scores, languages.utterances)
    return {**result, "samples": samples, "clip": clip, "language_table": table}


def _scores(sums: list[float], losses: dict[str, float]) -> dict[str, float]:
    """Return the losses and error rates of their sums and counts."""
    terms, rates = sums[: 2 * len(losses)], sums[2 * len(losses) :]
    result = {"words": rates[1]}
    for name, wrong, units in zip(RATES, rates[::2], rates[1::2], strict=True):
        if units:
            result[name] = wrong / units
    means = {
        name: total / max(count, 1.0)
        for name, total, count in zip(losses, terms[::2], terms[1::2], strict=True)
    }
    return {"loss": weighted_sum(means, losses), **means, **result}


def prediction_rows(samples: list[dict], hypotheses: list[str]) -> list[dict]:
    """Return the rows that evaluation would write for these answers."""
    from evaluation.run import prediction_row

    return [
        prediction_row(sample, text, text, "greedy")
        for sample, text in zip(samples, hypotheses, strict=False)
    ]


def scores_by_task(rows: list[tuple[str, dict]], ranks: Ranks) -> dict[str | None, dict[str, float]]:
    """Return {set, or None for all: {score: value}} of this rank's (set, row) pairs and those of all ranks,
    by the metrics of their tasks. Error rates of transcripts are not repeated. Collective: rank 0 computes.
    """
    result: dict[str | None, dict[str, float]] = {}
    gathered = gather(rows)
    if ranks.is_main:
        everything = [pair for part in gathered for pair in part]
        parts = list(dict.fromkeys(name for name, _ in everything if name))
        groups: dict[str | None, list[dict]] = {None: [row for _, row in everything]}
        groups |= {part: [row for name, row in everything if name == part] for part in parts}
        result = {part: _metric_scores(members) for part, members in groups.items()}
    return from_main(result)


def _metric_scores(rows: list[dict]) -> dict[str, float]:
    """Return the two columns of each metric that the rows' tasks have, but those that SCORES holds."""
    by_metric: dict[str, list[dict]] = {}
    by_task: dict[str, list[dict]] = {}
    for row in with_tokenizers(with_labels(rows, rows), rows):
        by_task.setdefault(row.get("task") or "asr", []).append(row)
    for members in by_task.values():
        by_metric.setdefault(metric_of(members), []).extend(members)
    metrics: dict[str, float] = {}
    for name, members in by_metric.items():
        try:
            scores = METRICS[name].score(members, "script")
        except Exception as error:  # a score must not end training
            logger.warning("validation: metric %s failed (%s)", name, one_line(error))
            continue
        columns = [column for column in METRICS[name].columns if column not in SCORES]
        metrics |= {
            column: float(scores[column])
            for column in columns
            if column not in metrics and isinstance(scores.get(column), (int, float))
        }
    return metrics
