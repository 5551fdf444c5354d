"""Validation during training: the loss, and the error rates of what the model writes, on the same utterances
each time."""

from __future__ import annotations

import logging
import math
from collections import Counter
from dataclasses import replace

import torch
from tqdm import tqdm

from core.distributed import Ranks
from core.languages import is_known
from core.text import RATES, Unit, count_errors, says_nothing
from model.batch import Batch
from model.features import log_mel
from model.losses import LOSSES
from recipe.config import Recipe
from recipe.stages import Stage
from stream import validation_batches, validation_waveforms
from train.engine import Engine, weighted_sum
from train.step_counts import all_reduce

MAX_NEW_TOKENS = 128
#: Scores by which the best model can be chosen, the lower the better: error rates (core/text.py) and the
# loss.
SCORES = (*RATES, "loss")
logger = logging.getLogger("soundwave")


def word_errors(
    references: list[str], hypotheses: list[str], langs: list[str | None] | None = None, unit: Unit = "word"
) -> tuple[int, int]:
    """Return (errors, reference units), as evaluation counts them. Without `langs` the references' scripts
    decide what a word is; utterances whose reference says nothing are left out."""
    langs = langs or [None] * len(references)
    said = [i for i, reference in enumerate(references) if not says_nothing(reference)]
    counted = count_errors(*([texts[i] for i in said] for texts in (references, hypotheses, langs)), unit)
    return int(counted.errors.sum()), int(counted.units.sum())


def chosen_by(result: dict, asked: str) -> str:
    """Return the score by which a validation is compared: the one asked for, or the loss where the references
    hold no words."""
    return asked if asked in result else "loss"


def is_better(found: dict, best: dict | None) -> bool:
    """Return whether a validation {by, score, loss} beats the best so far; of equal scores the lower loss
    wins."""
    if not math.isfinite(found["score"]):
        return False
    if best is None or best.get("by", "wer") != found["by"]:
        return True
    return (found["score"], found["loss"]) < (best["score"], best.get("loss", math.inf))


ValidationSet = list[
    tuple[Batch, list[str], Batch | None]
]  # (batch with labels, references, prompts to be continued)


def _arguments(recipe: Recipe, stage: Stage, tokenizer, ranks: Ranks) -> tuple:
    return (
        recipe.data,
        stage.name,
        tokenizer,
        recipe.model,
        ranks.rank,
        ranks.world_size,
        recipe.log.validate_utterances,
    )


def validation_set(recipe: Recipe, stage: Stage, tokenizer, ranks: Ranks) -> ValidationSet:
    """This rank's share of data.valid, read once; the same number of batches on every rank."""
    arguments = _arguments(recipe, stage, tokenizer, ranks)
    labelled = validation_batches(*arguments, answers=True)
    unknown = Counter(
        lang for batch, _ in labelled for lang in batch.languages if lang and not is_known(lang)
    )
    if unknown and ranks.is_main:
        logger.warning(
            "%d utterances of data.valid have a language that is not known (%s): their text is split into "
            "words by "
            "its script",
            unknown.total(),
            ", ".join(sorted(unknown)),
        )
    if stage.score == "ctc":
        return [(batch, references, None) for batch, references in labelled]
    prompts = validation_batches(*arguments, answers=False)
    return [
        (batch, references, prompt)
        for (batch, references), (prompt, _) in zip(labelled, prompts, strict=True)
    ]


def clip_mel(
    recipe: Recipe, stage: Stage, tokenizer, ranks: Ranks, batches: ValidationSet, audio_id: int | None
) -> torch.Tensor | None:
    """Return the log-mel spectrogram [bands, frames] of `fixed_clip`, from its audio: cached features have
    none. None where the audio cannot be decoded."""
    number, audio, row = fixed_clip(batches, audio_id)
    batch = validation_waveforms(*_arguments(recipe, stage, tokenizer, ranks), number)
    if (
        row < 0
        or batch.waveforms is None
        or len(batch.audio_lengths) != len(batches[number][0].audio_lengths)
    ):
        return None
    size = batch.audio_lengths[audio : audio + 1]
    return log_mel(batch.waveforms[audio : audio + 1, : int(size)], size, 80)[0][0]


def fixed_clip(batches: ValidationSet, audio_id: int | None) -> tuple[int, int, int]:
    """(batch, audio in it, row in it) of the clip that is drawn each time: of this rank's, one of median
    length. A rank without audio draws nothing, but computes along with the others: its first dummy."""
    found = sorted(
        (int(length), number, audio)
        for number, (batch, _, _) in enumerate(batches)
        if not batch.audio_is_dummy
        for audio, length in enumerate(batch.audio_lengths.tolist())
    )
    if not found:
        return 0, 0, -1
    _, number, audio = found[len(found) // 2]
    ids = batches[number][0].input_ids
    per_row = (ids == audio_id).sum(1).cumsum(0) if ids.shape[1] else torch.arange(1, len(ids) + 1)
    return number, audio, int((per_row <= audio).sum())


def validate(engine: Engine, batches: ValidationSet, tokenizer, ranks: Ranks) -> dict[str, float]:
    """{"loss", each loss by name, "wer", "cer", "mer", "words", "samples": [(reference, hypothesis), ...],
    "clip": (inspection, reference, hypothesis) or None}; numbers over all ranks, samples and clip of this
    one. An error rate is missing where the references hold no words. A batch without references fills up a
    rank's share: computed, for the collectives of ZeRO-3, and not counted.
    """
    stage, model, names = engine.stage, engine.model, tuple(engine.losses)
    # Sum and count of each loss, then errors and units of each rate.
    sums = [0.0] * (2 * len(names) + 2 * len(RATES))
    samples, written = [], []
    with engine.whole_model() as synced:
        for batch, references, prompts in tqdm(
            batches, desc="validate", unit="batch", leave=False, disable=not ranks.is_main
        ):
            batch = batch.to(ranks.device)
            output = model(batch, losses=names)
            if stage.score == "ctc":
                hypotheses = model.ctc_greedy(batch)
            else:
                ids = model.generate(
                    prompts.to(ranks.device), max_new_tokens=MAX_NEW_TOKENS, synced_gpus=synced
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
                sums = [a + b for a, b in zip(sums, local, strict=True)]
                samples += list(zip(references, hypotheses, strict=False))
        number, audio, row = fixed_clip(batches, model.audio_id)
        batch, references, _ = batches[number]
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
    summed = all_reduce(sums, ranks)
    terms, rates = summed[: 2 * len(names)], summed[2 * len(names) :]
    result: dict = {"words": rates[1]}
    for name, wrong, units in zip(RATES, rates[::2], rates[1::2], strict=True):
        if units:
            result[name] = wrong / units
    losses = {
        name: total / max(count, 1.0)
        for name, total, count in zip(names, terms[::2], terms[1::2], strict=True)
    }
    loss = weighted_sum(losses, engine.losses)
    return {"loss": loss, **losses, **result, "samples": samples, "clip": clip}
