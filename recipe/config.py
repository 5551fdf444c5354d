"""The recipe: typed dataclasses < model folder that the stage starts from < YAML files < command line
`key=value`.

OmegaConf merges the layers. An unknown key, a wrong type or a value out of bounds stops the run before
anything is loaded, with one line that names the file and the key.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from core.console import one_line, shown
from core.near_names import either, near_names
from core.options import RecipeError, choice, expand_paths, is_name, location, number, numbers, problems
from core.plugins import PluginError, load_plugins
from model.config import SoundwaveConfig
from model.inheritance import StartError, differing_options, inherited_options
from model.stages import ENCODER_CHOICES, STAGES, is_encoder_choice

LARGEST_SEED = 2**63 - 1
MOST_STEPS = 10_000_000  # the plan of the mixture holds some numbers for each
FRESH = "fresh"  # init_from: start from no model folder


@dataclass
class Corpus:
    """One packed folder (index.json beside its shards) and its share in the mixture."""

    shards: str = location(
        ""
    )  # folder written by data_tools/pack.py, or a pipe/URL pattern for plain streaming
    weight: float | None = number(
        None, above=0
    )  # explicit weight within its task; null: by its number of utterances
    tasks: list[str] | None = None  # take only these tasks of the folder; null: all
    name: str | None = None  # data.valid: the set that its scores are shown for
    # Train on this share of its utterances, drawn by id: those of 0.1 are among those of 0.25.
    share: float = number(1.0, above=0, most=1)
    # Where that share begins: 0.75 takes a share of 0.25 from those that share: 0.75 leaves out.
    share_from: float = number(0.0, least=0, below=1)


@dataclass
class MixtureConfig:
    """Dynamic data mixture: p_task proportional to n_task^(1/tau), tau moving from tau_start to tau_end over
    the stage."""

    tau_start: float = number(1.0, above=0)
    tau_end: float = number(1.0, above=0)
    task_weights: dict[str, float] = field(default_factory=dict)  # explicit probabilities instead of sizes
    # Audio of a language within a task in proportion to hours^alpha: 1 by hours, 0 equal; null: by size.
    language_alpha: float | None = number(None, least=0, most=1)


@dataclass
class DataConfig:
    train: list[Corpus] = field(default_factory=list)
    valid: list[Corpus] = field(default_factory=list)
    mixture: MixtureConfig = field(default_factory=MixtureConfig)
    batch_seconds: float = number(
        3600.0, above=0
    )  # audio seconds in one global batch (one optimizer step, all ranks together)
    micro_batch_seconds: float = number(
        120.0, above=0
    )  # padded audio seconds in one rank's micro-batch at most
    micro_batch_tokens: int = number(8192, least=1)  # padded LLM positions in one rank's micro-batch at most
    min_seconds: float = number(0.1, least=0)  # shorter clips are rejected, named and counted
    max_seconds: float = number(30.0, above=0)
    ctc_text: str = "lower"  # normalisation of CTC targets: raw | lower | lower_no_punctuation
    seed: int = number(0, least=0, most=LARGEST_SEED)
    workers: int = number(2, least=0)
    prefetch: int = number(4, least=0)  # micro-batches ready ahead per worker
    # Audio of about one length that goes into a step together: more pads less, less mixes more; 0: any
    # lengths.
    bucket_seconds: float = number(120.0, least=0)
    shuffle_window_shards: int = number(16, least=1)  # shards whose utterances are shuffled together
    cache_features: str | None = location(
        None
    )  # folder for the frozen encoder's output, computed once; null: each step
    max_rejected_share: float = number(
        0.01, least=0, most=1
    )  # past this share of broken samples the run stops with the list
    speed_perturb: list[float] = numbers(least=0.5, most=2)  # e.g. [0.9, 1.0, 1.1]; off when empty
    spec_augment: bool = False
    noise_snr_db: list[float] = numbers(counts=(0, 2))  # [low, high] white noise; off when empty
    try_largest: bool | None = None  # run the largest micro-batch before the first step; null: on GPUs


@dataclass
class TrainConfig:
    """What the stage trains; null: what the stage trains by default."""

    encoder: str | None = None  # none | lora | last_4 (its last 4 layers) | all
    adapters: str | None = choice(None, "none", "alignment", "shrinking", "all")
    ctc_head: str | None = choice(None, "none", "all")
    llm: str | None = choice(None, "none", "lora", "all")  # all: without the embedding tables


@dataclass
class OptimConfig:
    # The stage's length: steps or epochs. A layer that sets one replaces the other.
    steps: int | None = number(4000, least=1, most=MOST_STEPS)
    epochs: float | None = number(None, above=0)  # as much audio as so many epochs of data.train hold
    lr_adapters: float = number(1e-3, least=0)
    lr_ctc_head: float = number(1e-3, least=0)
    lr_lora: float = number(2e-4, least=0)
    lr_encoder: float = number(1e-5, least=0)  # train.encoder; for LoRA on it rather 1e-4
    lr_llm: float = number(1e-5, least=0)  # train.llm: all
    betas: list[float] = numbers(0.9, 0.98, counts=(2,), least=0, below=1)
    eps: float = number(1e-8, above=0)
    weight_decay: float = number(0.01, least=0)  # not on norms and biases
    warmup_steps: int = number(400, least=0, most=MOST_STEPS)
    schedule: str = choice("cosine", "cosine", "linear", "constant")  # after the warm-up
    min_lr_share: float = number(0.05, least=0, most=1)  # where the schedule ends, as a share of the peak
    grad_clip: float = number(1.0, above=0)
    activation_checkpointing: bool = False
    stop_after: int | None = number(None, least=1)  # validations without a better score end the stage
    # Validate and export an exponential moving average of the trained weights; null: the weights themselves.
    ema_decay: float | None = number(None, above=0, below=1)

    @property
    def total_steps(self) -> int:
        """The optimizer steps of the stage. Errors: RuntimeError where `epochs` is not resolved yet
        (stream/epochs.py)."""
        if self.steps is None:
            raise RuntimeError("optim.epochs is not resolved: call stream.epochs.resolve_steps first")
        return self.steps


@dataclass
class LossConfig:
    ctc_weight: float = number(0.3, least=0)  # stage 2: CE + this times CTC
    weights: dict[str, float] = field(default_factory=dict)  # further losses by name, e.g. {my_loss: 0.5}


@dataclass
class CheckpointConfig:
    every_steps: int = number(500, least=1)
    every_minutes: float = number(30.0, above=0)  # whichever of the two comes first
    keep_last: int = number(2, least=0)
    keep_best: bool = True
    best_by: str = "wer"  # wer | cer | mer | loss | bleu | ..., or SET/wer; of equal ones the lower loss
    copy_to: str | None = location(None)  # a second folder that gets each finished checkpoint
    accept_changes: list[str] = field(
        default_factory=list
    )  # base | tokenizer | recipe | index: accepted on resume


@dataclass
class LogConfig:
    every_steps: int = number(10, least=1)
    validate_every_steps: int = number(500, least=1)
    validate_utterances: int = number(200, least=1)
    sample_ids: bool = False  # samples.jsonl: the ids that each rank consumed in each step
    validate_at_start: bool = True  # score the untrained stage too, before its first step
    gather_to_validate: bool = (
        True  # ZeRO-3: hold the whole model on every rank while validating; false: layer by layer
    )
    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])  # tensorboard | wandb | mlflow
    tensorboard: bool = True  # false: leave it out of `trackers`


@dataclass
class HealthConfig:
    spike_sigma: float = number(
        8.0, above=0
    )  # gradient norm beyond median + this many robust deviations: the step is skipped
    window: int = number(
        128, least=32, why="fewer steps say nothing about a spike"
    )  # at least health.Health.MINIMUM
    max_consecutive_skips: int = number(
        5, least=1
    )  # then back to the last good checkpoint, past the bad stretch
    max_rollbacks: int = number(2, least=0)  # then stop with a report
    desync_every_steps: int = number(500, least=0)
    timeout_minutes: float = number(30.0, above=0)  # a rank waits so long for the others in a collective


@dataclass
class Recipe:
    # Modules that are imported before the recipe is checked: your own losses, stages, compressors, metrics.
    plugins: list[str] = field(default_factory=list)
    stage: str = "alignment"  # alignment (1) | shrinking (2) | sft (3)
    output: str = location(
        "runs/soundwave"
    )  # <output>/<stage>/ holds checkpoints, logs and the finished model folder
    # The model folder that the stage starts from; null: <output>/<previous stage>/model | fresh: none.
    init_from: str | None = location(None)
    init_accept: list[str] = field(
        default_factory=list
    )  # model keys that may differ from that folder's: an ablation
    seed: int = number(0, least=0, most=LARGEST_SEED)
    model: SoundwaveConfig = field(default_factory=SoundwaveConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    deepspeed: str = location("ds_configs/zero3.json")


CORPORA = ("data.train", "data.valid")
#: Keys that hold numbers by name, and an example of each.
BY_NAME = {
    "data.mixture.task_weights": "{asr: 0.8}",
    "loss.weights": "{my_loss: 0.5}",
    "model.compressor_options": "{stack: 5}",
    "model.llm.lora_rank_pattern": "{q_proj: 8}",
    "model.llm.lora_alpha_pattern": "{q_proj: 16}",
}


def start_folder(recipe: Recipe) -> Path | None:
    """Return the model folder that the recipe starts from, whether it exists or not: `init_from`, or the
    previous stage's. None for stage 1 by default, and where `init_from` is `fresh`."""
    if recipe.init_from == FRESH:
        return None
    if recipe.init_from:
        return Path(recipe.init_from)
    stage = STAGES.get(recipe.stage)
    return Path(recipe.output) / stage.previous / "model" if stage and stage.previous else None


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe. `base: other.yaml` inside it names a recipe (relative to it) whose values come first.

    Model keys that no layer sets are those of the model folder that the stage starts from, where that exists.
    Paths are expanded (~, $VARIABLE).
    Errors: RecipeError with one line for a file that is missing or no recipe, an unknown key (the nearest
    right key is suggested), a value of the wrong type or out of bounds, an override that is not `key=value`,
    a plugin that cannot be imported, and a model key that contradicts the start folder.
    """
    layers = [*_read_files(Path(path)), *map(_read_override, overrides)]
    recipe = _merge(OmegaConf.structured(Recipe), layers)
    start = start_folder(recipe)
    if start is None or not (start / "soundwave.json").exists():
        return recipe
    return _inherit(recipe, layers, start)


def loadable(recipe: Recipe) -> Recipe:
    """Return the recipe as a file holds it: without the steps that its epochs make."""
    if recipe.optim.epochs is None:
        return recipe
    return dataclasses.replace(recipe, optim=dataclasses.replace(recipe.optim, steps=None))


# ------------------------------------------------------------------------------------------------------------


def _read_files(path: Path) -> list[tuple[str, DictConfig]]:
    """(file name, content) of a recipe and of its bases, the first base first."""
    layers: list[tuple[str, DictConfig]] = []
    seen: list[Path] = []
    following: Path | None = path
    while following is not None:
        path = following.expanduser()
        if path.resolve() in seen:
            cycle = " -> ".join([*(where for where, _ in reversed(layers)), str(path)])
            raise RecipeError(f"recipe {path}: its base leads back to itself ({cycle}): remove one `base:`")
        seen.append(path.resolve())
        layer = _read_yaml(path)
        named = "base" in layer
        try:
            base = layer.pop("base", None)
        except OmegaConfBaseException as error:
            raise RecipeError(f"{path}: base: {_unresolved(error)}") from None
        if named and not (isinstance(base, str) and is_name(base)):
            raise RecipeError(f"{path}: base is {_shown(base)}: give the name of one YAML file")
        layers.insert(0, (str(path), layer))
        following = path.parent / Path(base).expanduser() if named else None
    return layers


def _read_yaml(path: Path) -> DictConfig:
    if not is_name(str(path)) or not path.exists():
        raise RecipeError(
            f"recipe {str(path) or 'with an empty name'} does not exist: give the path of a YAML file, e.g. "
            "train/recipes/stage1.yaml"
        )
    try:
        layer = OmegaConf.load(path)
    except OSError as error:
        raise RecipeError(
            f"recipe {path} cannot be read: {error.strerror or 'it is no mapping of keys to values'}"
        ) from None
    except Exception as error:  # yaml's own error types carry line and column
        raise RecipeError(
            f"recipe {path} is not valid YAML: {' '.join(str(error).split()) or one_line(error)}"
        ) from None
    if not isinstance(layer, DictConfig):
        raise RecipeError(
            f"recipe {path} is no mapping: write lines such as `stage: alignment`, without a dash before them"
        )
    return layer


def _read_override(item: str) -> tuple[str, DictConfig]:
    """("command line", {key: value}) of one `key=value`."""
    key, equals, value = item.partition("=")
    if not equals:
        raise RecipeError(f"'{item}' is not key=value: write e.g. optim.steps=100")
    if not re.fullmatch(r"\w+(\.\w+)*", key):
        raise RecipeError(
            f"'{item}': '{key}' is no key: write e.g. optim.steps=100, and a list as a whole: "
            "data.train=[{shards: DIR}]"
        )
    try:
        layer = OmegaConf.from_dotlist([item])
    except Exception as error:  # yaml's and OmegaConf's, for an unclosed bracket, say
        raise RecipeError(
            f"command line: {key}: '{value}' is not valid YAML: {' '.join(str(error).split())}"
        ) from None
    if key.partition(".")[0] == "base":
        raise RecipeError(f"'{item}': write `base:` into a recipe; the command line takes single keys")
    return "command line", layer


def _merge(merged: DictConfig, layers: list[tuple[str, DictConfig]]) -> Recipe:
    known = known_keys(merged)
    for where, layer in layers:
        content = _plain(layer)
        for key in _flat(content):
            if key.startswith(tuple(f"{corpora}." for corpora in CORPORA)):
                raise RecipeError(
                    f"{where}: {key} is set, and {key.rpartition('.')[0]} is a list: write "
                    f"{key.rpartition('.')[0]}=[{{shards: DIR}}]"
                )
            if key not in known and not key.startswith(tuple(f"{free}." for free in BY_NAME)):
                raise RecipeError(f"{where}: unknown key '{key}'; did you mean {_near(key, known)}?")
        for path, value in _leaves(content):
            if value == "???":  # OmegaConf would keep the value of an earlier layer
                raise RecipeError(f"{where}: {_key(path)} is ???: give it a value")
        for key in CORPORA:
            _check_corpora(where, key, content.get("data") or {})
        merged = _merge_layer(merged, where, layer, content)
    _set_length(merged, layers)
    try:
        recipe = cast(Recipe, OmegaConf.to_object(merged))  # made from that class
    except (
        Exception
    ) as error:  # an interpolation that leads nowhere; OmegaConf reports some with built-in types
        key = getattr(error, "full_key", None) or ""
        raise RecipeError(f"{_origin(layers, key)}{key + ': ' if key else ''}{_unresolved(error)}") from None
    try:
        load_plugins(recipe.plugins)
    except PluginError as error:
        raise RecipeError(f"{_origin(layers, 'plugins')}{error}") from None
    try:
        expand_paths(recipe)
    except ValueError as error:
        raise RecipeError(f"{_origin(layers, str(error).partition(' ')[0])}{error}") from None
    for key, problem in itertools.chain(problems(recipe), _contradictions(recipe)):
        raise RecipeError(f"{_origin(layers, key)}{key} {problem}")
    return recipe


def _plain(layer: DictConfig) -> dict[str, Any]:
    """Return a layer as dictionaries and lists."""
    return cast(dict[str, Any], OmegaConf.to_container(layer))


def _merge_layer(merged: DictConfig, where: str, layer: DictConfig, content: dict) -> DictConfig:
    try:
        return cast(DictConfig, OmegaConf.merge(merged, layer))
    except (
        Exception
    ):  # OmegaConf's, or a built-in type: it names no key for some shapes, so each key is tried by itself
        for path, value in _leaves(content):
            alone: Any = value
            for name in reversed(path):
                alone = {name: alone}
            try:
                OmegaConf.merge(merged, OmegaConf.create(alone))
            except Exception:  # the same one
                raise RecipeError(f"{where}: {_key(path)} {_needs(path, value)}") from None
        raise


def _set_length(merged: DictConfig, layers: list[tuple[str, DictConfig]]) -> None:
    """Keep `optim.steps` or `optim.epochs`, whichever the last layer sets that sets one. Errors: RecipeError
    where one file, or the command line, sets both, or the recipe ends up with none."""
    given: dict[str, set[str]] = {}
    for where, layer in layers:
        optim = _plain(layer).get("optim") or {}
        given.setdefault(where, set()).update(
            key for key in ("steps", "epochs") if optim.get(key) is not None
        )
    for where, keys in given.items():
        if len(keys) == 2:
            raise RecipeError(f"{where}: optim.steps and optim.epochs are both set: keep one")
    if last := [keys for keys in given.values() if keys]:
        merged.optim["epochs" if "steps" in last[-1] else "steps"] = None
    if merged.optim.steps is None and merged.optim.epochs is None:
        raise RecipeError(f"{_origin(layers, 'optim.steps')}optim.steps is null: give steps, or optim.epochs")


def _check_corpora(where: str, key: str, data: dict) -> None:
    """Errors: RecipeError that names the entry and its key; OmegaConf's own errors do not."""
    corpora = data.get(key.partition(".")[2]) if isinstance(data, dict) else None
    fields = [field.name for field in dataclasses.fields(Corpus)]
    for place, corpus in enumerate(corpora if isinstance(corpora, list) else ()):
        if not isinstance(corpus, dict):
            raise RecipeError(
                f"{where}: {key}[{place}] is {_shown(corpus)}: write {key}=[{{shards: DIR}}], or [] for none"
            )
        for name, value in corpus.items():
            at = f"{where}: {key}[{place}]"
            glued = next((field for field in fields if str(name).startswith(f"{field}:")), None)
            if glued:
                raise RecipeError(
                    f"{at}: '{name}': write a blank after the colon: {{{glued}: {name.partition(':')[2]}}}"
                )
            if name not in fields:
                raise RecipeError(f"{at}: unknown key '{name}'; did you mean {_near(str(name), fields)}?")
            try:
                OmegaConf.merge(OmegaConf.structured(Corpus), OmegaConf.create({name: value}))
            except Exception:  # OmegaConf's, or a built-in type
                raise RecipeError(f"{at}: {name} {_needs((name,), value, Corpus)}") from None


def _contradictions(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Yield (key, what is wrong) for keys that do not go together."""
    data, model = recipe.data, recipe.model
    if data.min_seconds > data.max_seconds:
        yield (
            "data.min_seconds",
            f"is {data.min_seconds:g}, above data.max_seconds={data.max_seconds:g}: no clip is left",
        )
    if len(data.noise_snr_db) == 2 and data.noise_snr_db[0] > data.noise_snr_db[1]:
        yield (
            "data.noise_snr_db",
            f"is {list(data.noise_snr_db)}: give [lowest, highest] in dB, e.g. [10, 30]",
        )
    if model.alignment.ctc_length == "full" and model.encoder.pad_to_seconds is None:
        yield (
            "model.alignment.ctc_length",
            (
                "is full, which counts the padding's frames, and model.encoder.pad_to_seconds pads "
                "nothing: set it, or write model.alignment.ctc_length: 'true'"
            ),
        )
    if recipe.train.encoder is not None and not is_encoder_choice(recipe.train.encoder):
        yield "train.encoder", f"is {_shown(recipe.train.encoder)}: give {ENCODER_CHOICES}"
    model_keys = [key for key in known_keys() if key.startswith("model.")] if recipe.init_accept else []
    for key in recipe.init_accept:
        if key not in model_keys:
            yield (
                "init_accept",
                f"names '{key}', which is no key of the model; did you mean {_near(key, model_keys)}?",
            )


# -----------------------------------------------------------------------------------------------------------


def _inherit(recipe: Recipe, layers: list[tuple[str, DictConfig]], start: Path) -> Recipe:
    """The recipe with the start folder's model options where no layer sets them. Errors: RecipeError where
    one contradicts."""
    try:
        options = {f"model.{key}": value for key, value in inherited_options(start).items()}
    except StartError as error:
        raise RecipeError(str(error)) from None
    merged = OmegaConf.structured(Recipe)
    for key, value in options.items():
        if _origin(layers, key) == "":
            try:
                OmegaConf.update(merged, key, value)
            except Exception:  # OmegaConf's, or a built-in type
                raise RecipeError(
                    f"{start / 'soundwave.json'}: {key} {_needs(tuple(key.split('.')), value)}"
                ) from None
    recipe = _merge(merged, layers)
    differ = {
        key: values
        for key, values in differing_options(recipe.model, start).items()
        if key not in recipe.init_accept
    }
    if differ:
        lines = [
            f"{key}: {_shown(then)} in the folder, {_shown(now)} in {_origin(layers, key).removesuffix(': ')}"
            for key, (then, now) in differ.items()
        ]
        raise RecipeError(
            f"the recipe contradicts {start}, which this stage starts from ({'; '.join(lines)}): remove the "
            f"keys "
            "from "
            f"the recipe (the folder's values are then used), or accept with init_accept=[{','.join(differ)}]"
        )
    return recipe


# ------------------------------------------------------------------------------------------------------------


def known_keys(node: Any = None, prefix: str = "") -> list[str]:
    node = OmegaConf.structured(Recipe) if node is None else node
    keys = []
    for key in node:
        full = f"{prefix}{key}"
        keys.append(full)
        child = node[key] if not OmegaConf.is_missing(node, key) else None
        if OmegaConf.is_dict(child):
            keys += known_keys(child, full + ".")
    return keys


def _near(key: str, known: list[str]) -> str:
    """Return the keys whose last word is most similar: of the same section if it has one, unless another
    section has the very word."""
    section, _, word = key.rpartition(".")
    names = {k: k.rpartition(".")[2] for k in known}
    candidates = [
        k for k in known if section and k.startswith(section + ".") and word not in names.values()
    ] or known
    return either(near_names(word, candidates, cutoff=0.0, compared=names.__getitem__))


def _flat(node: dict, prefix: str = "") -> list[str]:
    keys = []
    for key, value in node.items():
        keys.append(f"{prefix}{key}")
        if isinstance(value, dict):
            keys += _flat(value, f"{prefix}{key}.")
    return keys


def _origin(layers: list[tuple[str, DictConfig]], key: str) -> str:
    """ "FILE: " of the last layer that sets a key, or its list; "" where none does."""
    key = key.partition("[")[0]
    return next((f"{where}: " for where, layer in reversed(layers) if key in _flat(_plain(layer))), "")


def _leaves(node: dict, path: tuple = ()) -> Iterator[tuple[tuple, object]]:
    for key, value in node.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, (*path, key))
        else:
            yield (*path, key), value


def _key(path: tuple) -> str:
    return ".".join(map(str, path))


def _unresolved(error: Exception) -> str:
    """What is wrong with an interpolation or its value, in one line."""
    unset = re.search(r"Environment variable '(\w+)' not found", str(error))
    if unset:
        return f"the environment has no {unset[1]}: set it, or give a default: ${{oc.env:{unset[1]},VALUE}}"
    return one_line(error)


_NEEDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "list[float]": "a list of numbers, e.g. [0.9, 0.98]",
    "list[str]": "a list of names, e.g. [asr, translation]",
    "dict[str, float]": "numbers by name, e.g. {asr: 0.8}",
}


def _needs(path: tuple, value: object, owner: Any = Recipe) -> str:
    """ "is VALUE: needs ..." by the declared type of a key."""
    if not all(isinstance(name, str) for name in path):
        return f"is named by {_shown(path[-1])}, which is no text: write the name in quotes"
    kind = ""
    for name in path:
        if not dataclasses.is_dataclass(owner):
            example = next(example for key, example in BY_NAME.items() if _key(path).startswith(f"{key}."))
            return f"is {_shown(value)}: give numbers by name, e.g. {example}"
        field = next(field for field in dataclasses.fields(owner) if field.name == name)
        kind, owner = str(field.type), field.default_factory
    empty = value is None or value == ""
    start = "has no value" if empty else f"is {_shown(value)}"
    if _key(path) in CORPORA:
        return f"{start}: write {_key(path)}=[{{shards: DIR}}], or [] for none"
    if dataclasses.is_dataclass(owner):
        return f"{'is empty' if empty else start}: it is a section: set keys below it, or remove the line"
    words = _NEEDS.get(kind.removesuffix(" | None"), "another value")
    return f"{start}: give {words}{', or null' if kind.endswith(' | None') else ''}"


def _shown(value: object) -> str:
    return shown(OmegaConf.to_container(value) if OmegaConf.is_config(value) else value)
