"""The recipe: typed dataclasses < YAML file < command line `key=value`, merged and checked by OmegaConf.

An unknown key stops the run before anything is loaded, with the nearest right key in the message.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from model.config import SoundwaveConfig


class RecipeError(ValueError):
    """A recipe that cannot be run; the message is one line: what, where, what to do."""


@dataclass
class Corpus:
    """One packed folder (index.json beside its shards) and its share in the mixture."""

    shards: str = ""  # folder written by data_tools/pack.py, or a pipe/URL pattern for plain streaming
    weight: float | None = None  # explicit weight within its task; null: by its number of utterances
    tasks: list[str] | None = None  # take only these tasks of the folder; null: all
    share: float = 1.0  # train on this share of its utterances, drawn by id: those of 0.1 are among those of 0.25
    share_from: float = 0.0  # where that share begins: 0.75 takes a share of 0.25 from those that share: 0.75 leaves out


@dataclass
class MixtureConfig:
    """Dynamic data mixture: p_task proportional to n_task^(1/tau), tau moving from tau_start to tau_end over the stage."""

    tau_start: float = 1.0
    tau_end: float = 1.0
    task_weights: dict[str, float] = field(default_factory=dict)  # explicit probabilities instead of sizes


@dataclass
class DataConfig:
    train: list[Corpus] = field(default_factory=list)
    valid: list[Corpus] = field(default_factory=list)
    mixture: MixtureConfig = field(default_factory=MixtureConfig)
    batch_seconds: float = 3600.0  # audio seconds in one global batch (one optimizer step, all ranks together)
    micro_batch_seconds: float = 120.0  # padded audio seconds in one rank's micro-batch at most
    micro_batch_tokens: int = 8192  # padded LLM positions in one rank's micro-batch at most
    min_seconds: float = 0.1  # shorter clips are rejected, named and counted
    max_seconds: float = 30.0
    ctc_text: str = "lower"  # normalisation of CTC targets: raw | lower | lower_no_punctuation
    seed: int = 0
    workers: int = 2
    prefetch: int = 4  # micro-batches ready ahead per worker
    bucket_seconds: float = 120.0  # audio of about one length that goes into a step together: more pads less, less mixes more
    shuffle_window_shards: int = 16  # shards whose utterances are shuffled together
    cache_features: str | None = None  # folder for the frozen encoder's output, computed once; null: encode in each step
    max_rejected_share: float = 0.01  # past this share of broken samples the run stops with the list
    speed_perturb: list[float] = field(default_factory=list)  # e.g. [0.9, 1.0, 1.1]; off when empty
    spec_augment: bool = False
    noise_snr_db: list[float] = field(default_factory=list)  # [low, high] white noise; off when empty
    try_largest: bool | None = None  # run the largest micro-batch before the first step; null: on GPUs


@dataclass
class OptimConfig:
    steps: int = 4000
    lr_adapters: float = 1e-3
    lr_ctc_head: float = 1e-3
    lr_lora: float = 2e-4
    betas: list[float] = field(default_factory=lambda: [0.9, 0.98])
    eps: float = 1e-8
    weight_decay: float = 0.01  # not on norms and biases
    warmup_steps: int = 400
    schedule: str = "cosine"  # cosine | linear | constant, after the warm-up
    min_lr_share: float = 0.05  # where the schedule ends, as a share of the peak
    grad_clip: float = 1.0
    activation_checkpointing: bool = False


@dataclass
class LossConfig:
    ctc_weight: float = 0.3  # stage II: CE + this times CTC


@dataclass
class CheckpointConfig:
    every_steps: int = 500
    every_minutes: float = 30.0  # whichever of the two comes first
    keep_last: int = 2
    keep_best: bool = True
    best_by: str = "wer"  # of a validation, the lower the better: wer | cer | mer | loss; of equal ones the lower loss
    copy_to: str | None = None  # a second folder that gets each finished checkpoint
    accept_changes: list[str] = field(default_factory=list)  # base | tokenizer | recipe | index: accepted on resume


@dataclass
class LogConfig:
    every_steps: int = 10
    validate_every_steps: int = 500
    validate_utterances: int = 200
    sample_ids: bool = False  # samples.jsonl: the ids that each rank consumed in each step
    validate_at_start: bool = True  # score the untrained stage too, before its first step
    gather_to_validate: bool = True  # ZeRO-3: hold the whole model on every rank while validating; false: layer by layer
    tensorboard: bool = True


@dataclass
class HealthConfig:
    spike_sigma: float = 8.0  # gradient norm beyond median + this many robust deviations: the step is skipped
    window: int = 128
    max_consecutive_skips: int = 5  # then back to the last good checkpoint, past the bad stretch
    max_rollbacks: int = 2  # then stop with a report
    desync_every_steps: int = 500


@dataclass
class Recipe:
    stage: str = "alignment"  # alignment (I) | shrinking (II) | sft (III)
    output: str = "runs/soundwave"  # <output>/<stage>/ holds checkpoints, logs and the finished model folder
    init_from: str | None = None  # model folder of the previous stage; null: <output>/<previous stage>/model | fresh: none
    seed: int = 0
    model: SoundwaveConfig = field(default_factory=SoundwaveConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    deepspeed: str = "ds_configs/zero3.json"


CORPORA = ("data.train", "data.valid")


def known_keys(node: object = None, prefix: str = "") -> list[str]:
    node = OmegaConf.structured(Recipe) if node is None else node
    keys = []
    for key in node:
        full = f"{prefix}{key}"
        keys.append(full)
        child = node[key] if not OmegaConf.is_missing(node, key) else None
        if OmegaConf.is_dict(child):
            keys += known_keys(child, full + ".")
    return keys


def _nearest(key: str, known: list[str]) -> str:
    """The key whose last word reads most alike: of the same section if there is one, unless the word stands elsewhere."""
    section, _, word = key.rpartition(".")
    names = {k: k.rpartition(".")[2] for k in known}
    near = [k for k in known if section and k.startswith(section + ".") and word not in names.values()] or known
    return max(near, key=lambda k: difflib.SequenceMatcher(None, word, names[k]).ratio())


def _flat(node: dict, prefix: str = "") -> list[str]:
    keys = []
    for key, value in node.items():
        keys.append(f"{prefix}{key}")
        if isinstance(value, dict):
            keys += _flat(value, f"{prefix}{key}.")
    return keys


def load_recipe(path: str | Path, overrides: list[str] = ()) -> Recipe:
    """Read a recipe. `base: other.yaml` inside it names a recipe (relative to it) whose values come first.

    Errors: RecipeError with one line for a missing file, an unknown key (the nearest right key is suggested), a value of
    the wrong type or an override that is not `key=value`.
    """
    path = Path(path)
    layers = []
    while path is not None:
        if not path.exists():
            raise RecipeError(f"recipe {path} does not exist: give the path of a YAML file, e.g. train/recipes/stage1.yaml")
        try:
            layer = OmegaConf.load(path)
        except Exception as error:  # yaml's own error types carry line and column
            raise RecipeError(f"recipe {path} is not valid YAML: {' '.join(str(error).split())}") from None
        base = layer.pop("base", None)
        layers.insert(0, (str(path), layer))
        path = path.parent / base if base else None
    for item in overrides:
        if "=" not in item:
            raise RecipeError(f"'{item}' is not key=value: write e.g. optim.steps=100")
    layers.append(("command line", OmegaConf.from_dotlist(list(overrides))))
    merged = OmegaConf.structured(Recipe)
    known = known_keys(merged)
    for where, layer in layers:
        for key in _flat(OmegaConf.to_container(layer)):
            if key not in known and not key.startswith("data.mixture.task_weights."):
                raise RecipeError(f"{where}: unknown key '{key}'; did you mean '{_nearest(key, known)}'?")
        try:
            merged = OmegaConf.merge(merged, layer)
        except OmegaConfBaseException as error:
            where_in = error.full_key or ""
            hint = next((f"; write {key}=[{{shards: DIR}}], or [] for none" for key in CORPORA if where_in.startswith(key)), "")
            raise RecipeError(f"{where}: {where_in}: {str(error).splitlines()[0]}{hint}") from None
    return OmegaConf.to_object(merged)
