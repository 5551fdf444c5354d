"""Stages as data: which parts are loaded and trained, with which losses, and how the result is scored.

Nothing else compares stage names. A user's stage is one more entry of STAGES (docs/extending.md).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from core.registry import Registry

PARTS = ("encoder", "adapters", "llm")
#: Modules that can be trained, and the group of the optimizer (a learning rate of the recipe) that each is
# in.
TRAINABLE = {
    "alignment": "adapters",
    "shrinking": "adapters",
    "ctc_head": "ctc_head",
    "lora": "lora",
    "encoder": "encoder",  # its layers
    "encoder_lora": "encoder",
    "llm": "llm",  # its layers, without the embedding tables
}
RATES = {group: f"optim.lr_{group}" for group in TRAINABLE.values()}
_WITH_DROPOUT = ("alignment", "shrinking")
_LAST = re.compile(r"last_([1-9]\d*)")
ENCODER_CHOICES = "none, lora, all or last_N, e.g. last_4"
SCORES = ("ctc", "generate")


@dataclass(frozen=True)
class Stage:
    """One stage of training.

    parts: what `Soundwave.build` loads; without "llm" the language model's layers are never read.
    trains: modules of TRAINABLE; all others are frozen and in eval mode.
    losses: names of LOSSES; the first has weight 1, the others have the weight of their recipe key.
    score: validation transcribes with the CTC head ("ctc") or lets the language model write ("generate").
    previous: the stage whose model folder it starts from by default; None: new adapters.
    without_effect: recipe keys (and sections, with a dot at the end) that change nothing of what it trains.
    number: how messages call it.
    encoder_layers: with "encoder", the last so many of its Transformer layers are trained; None: all weights.
    """

    name: str
    number: str
    parts: tuple[str, ...]
    trains: tuple[str, ...]
    losses: tuple[str, ...]
    score: str
    previous: str | None = None
    without_effect: tuple[str, ...] = ()
    encoder_layers: int | None = None

    def __post_init__(self) -> None:
        unknown = [part for part in self.parts if part not in PARTS]
        unknown += [module for module in self.trains if module not in TRAINABLE]
        if unknown or not self.trains or not self.losses or self.score not in SCORES:
            raise ValueError(
                f"stage '{self.name}': parts are of {', '.join(PARTS)}; trains (at least one) of "
                f"{', '.join(TRAINABLE)}; at least one loss; score is {' or '.join(SCORES)}"
            )
        without_llm = [module for module in self.trains if module in ("shrinking", "lora", "llm")]
        if not self.needs_llm and (without_llm or self.score == "generate"):
            raise ValueError(
                f"stage '{self.name}' loads no llm, which {' and '.join(without_llm) or 'its score'} needs: "
                "add it to parts"
            )

    @property
    def needs_llm(self) -> bool:
        """Whether conversations are trained on; without the LLM, only transcribed audio is."""
        return "llm" in self.parts

    @property
    def modules(self) -> tuple[str, ...]:
        """Modules with weights of ours that the stage uses, trained or not."""
        return ("alignment", "ctc_head", *(("shrinking",) if self.needs_llm else ()))

    @property
    def frozen(self) -> tuple[str, ...]:
        """Modules that it uses as an earlier stage trained them."""
        return tuple(module for module in self.modules if module not in self.trains)


def is_encoder_choice(value: str) -> bool:
    """Whether `train.encoder` may have this value."""
    return value in ("none", "lora", "all") or _LAST.fullmatch(value) is not None


def chosen(stage: Stage, choices: Mapping[str, str | None]) -> Stage:
    """Return a stage that trains what a recipe's `train` section asks for; None: what the stage itself does.

    choices: encoder, adapters, ctc_head, llm. `without_effect` follows. Errors: ValueError for a part that
    the stage does not have, and where nothing is left.
    """
    trains = list(stage.trains)

    def replace_modules(key: str, modules: tuple[str, ...], modules_of: dict[str, tuple[str, ...]]) -> None:
        if (value := choices.get(key)) is not None:
            trains[:] = [module for module in trains if module not in modules]
            trains.extend(modules_of[value])

    adapters = tuple(module for module in ("alignment", "shrinking") if module in stage.modules)
    if choices.get("adapters") == "shrinking" and "shrinking" not in adapters:
        raise ValueError(f"train.adapters: stage {stage.number} ({stage.name}) has no shrinking adapter")
    if choices.get("llm") in ("lora", "all") and not stage.needs_llm:
        raise ValueError(f"train.llm: stage {stage.number} ({stage.name}) does not load the LLM")
    each = {"none": (), "alignment": ("alignment",), "shrinking": ("shrinking",), "all": adapters}
    replace_modules("adapters", ("alignment", "shrinking"), each)
    replace_modules("ctc_head", ("ctc_head",), {"none": (), "all": ("ctc_head",)})
    replace_modules("llm", ("lora", "llm"), {"none": (), "lora": ("lora",), "all": ("llm",)})
    encoder, layers = choices.get("encoder"), stage.encoder_layers
    if encoder is not None:
        last = _LAST.fullmatch(encoder)
        layers = int(last[1]) if last else None
        kinds = {"none": (), "lora": ("encoder_lora",)}
        replace_modules("encoder", ("encoder", "encoder_lora"), {encoder: kinds.get(encoder, ("encoder",))})
    trains = [module for module in TRAINABLE if module in trains]
    if not trains:
        raise ValueError(f"train: nothing of stage {stage.number} ({stage.name}) would be trained")
    in_effect = {RATES[TRAINABLE[module]] for module in trains}
    in_effect |= {f"model.{module}.dropout" for module in _WITH_DROPOUT if module in trains}
    without_effect = [key for key in stage.without_effect if key not in in_effect]
    without_effect += [key for key in RATES.values() if key not in (*in_effect, *without_effect)]
    return replace(stage, trains=tuple(trains), encoder_layers=layers, without_effect=tuple(without_effect))


STAGES: Registry[Stage] = Registry("stage")


def register_stage(stage: Stage) -> Stage:
    """Add a stage. Errors: AlreadyRegistered."""
    STAGES.add(stage.name, stage)
    return stage


ALIGNMENT = register_stage(
    Stage(
        name="alignment",
        number="1",
        parts=("encoder", "adapters"),
        trains=("alignment", "ctc_head"),
        losses=("ctc",),
        score="ctc",
        without_effect=(
            "model.llm.lora_r",
            "model.llm.lora_alpha",
            "model.llm.lora_rslora",
            "model.llm.lora_dora",
            "model.llm.lora_init",
            "model.llm.quantization",
            "model.llm.lora_modules_to_save",
            "model.llm.lora_rank_pattern",
            "model.llm.lora_rank_pattern.",
            "model.llm.lora_alpha_pattern",
            "model.llm.lora_alpha_pattern.",
            "model.llm.lora_dropout",
            "model.llm.lora_targets",
            "model.shrinking.",
            "model.prompt",
            "model.system_prompt",
            "optim.lr_lora",
            "loss.ctc_weight",
            "data.micro_batch_tokens",
        ),
    )
)
SHRINKING = register_stage(
    Stage(
        name="shrinking",
        number="2",
        parts=("encoder", "adapters", "llm"),
        trains=("alignment", "shrinking", "ctc_head", "lora"),
        losses=("ce", "ctc"),
        score="generate",
        previous="alignment",
    )
)
SFT = register_stage(
    Stage(
        name="sft",
        number="3",
        parts=("encoder", "adapters", "llm"),
        trains=("lora",),
        losses=("ce",),
        score="generate",
        previous="shrinking",
        without_effect=(
            "model.alignment.dropout",
            "model.shrinking.dropout",
            "optim.lr_adapters",
            "optim.lr_ctc_head",
            "loss.ctc_weight",
        ),
    )
)
