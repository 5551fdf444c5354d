"""Stages as data: which parts are loaded and trained, with which losses, and how the result is scored.

Nothing else compares stage names. A user's stage is one more entry of STAGES (docs/extending.md).
"""

from __future__ import annotations

from dataclasses import dataclass

from core.registry import Registry

PARTS = ("encoder", "adapters", "llm")
#: Modules that can be trained, and the group of the optimizer (a learning rate of the recipe) that each is
# in.
TRAINABLE = {"alignment": "adapters", "shrinking": "adapters", "ctc_head": "ctc_head", "lora": "lora"}
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
    """

    name: str
    number: str
    parts: tuple[str, ...]
    trains: tuple[str, ...]
    losses: tuple[str, ...]
    score: str
    previous: str | None = None
    without_effect: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        unknown = [part for part in self.parts if part not in PARTS]
        unknown += [module for module in self.trains if module not in TRAINABLE]
        if unknown or not self.trains or not self.losses or self.score not in SCORES:
            raise ValueError(
                f"stage '{self.name}': parts are of {', '.join(PARTS)}; trains (at least one) of "
                f"{', '.join(TRAINABLE)}; at least one loss; score is {' or '.join(SCORES)}"
            )
        without_llm = [module for module in self.trains if module in ("shrinking", "lora")]
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
