"""Where the frozen parts come from: a folder, a hub name, or the size of a known model; their tensors and
their fingerprints."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from core.console import OneLine, one_line
from core.file_names import UnsafeName, plain_name
from core.json_files import JsonError, read_object
from core.memory import is_out_of_memory
from core.near_names import did_you_mean, near_names
from model.config import OptionError

PRESETS = Path(__file__).parent / "presets"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# or experts; a file that asks for more is damaged or hostile, and building them would take for ever
MOST_LAYERS = 10_000
_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]


class SourceError(OneLine, ValueError):
    """A model that cannot be found or is not what was asked for; one line: what, where, what to do."""


def device_of(name: torch.device | str | None) -> torch.device:
    """Return a device that can be used; None: a GPU where there is one. Errors: SourceError."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = one_line(str(error).split("\n")[0])
        raise SourceError(f"device {name} cannot be used ({reason}): give cpu, cuda or cuda:N") from None
    return device


@contextlib.contextmanager
def reading(folder: str | Path, what: str) -> Iterator[None]:
    """Turn whatever a library raises over a model folder's content into a SourceError of one line; the
    original is its cause.

    No list of exceptions would be complete: a hostile file reaches every branch, and tokenizers, written in
    Rust, panics.
    """
    try:
        yield
    except SourceError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        if is_out_of_memory(error):
            raise SourceError(f"there is no memory to load {folder} ({one_line(error)})") from error
        raise SourceError(
            f"{folder} has no {what} that can be loaded ({one_line(error)}): copy the model again, or save "
            f"it with "
            "save_pretrained"
        ) from error


@dataclass(frozen=True)
class Source:
    """A model's configuration, and the folder with its weights (None: only its sizes are known)."""

    name: str
    config: PretrainedConfig
    folder: Path | None

    @property
    def files(self) -> Path:
        """Return the folder. Errors: SourceError where only sizes are known."""
        if self.folder is None:
            raise SourceError(f"only the sizes of '{self.name}' are known: give a folder with its weights")
        return self.folder

    def without_weights(self) -> Source:
        return replace(self, folder=None)


def text_config(config: PretrainedConfig) -> PretrainedConfig:
    """The part that sizes the language model, of models that have others as well."""
    return config.get_text_config()


def presets() -> dict[str, dict]:
    """Sizes of known models: preset name -> {"names": [hub names], "config": {...}}."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(PRESETS.glob("*.json"))}


def _preset(name: str) -> dict | None:
    for stem, preset in presets().items():
        if name.lower() in (stem, *(n.lower() for n in preset["names"])):
            return preset
    return None


def read_json(path: Path) -> dict:
    """Return the object in a JSON file. Errors: SourceError."""
    try:
        return read_object(path)
    except JsonError as error:
        raise SourceError(f"{path} {error}: copy the model again") from None


def read_config(folder: Path) -> PretrainedConfig:
    """Return a model folder's configuration; code that the folder brings is never run.

    Errors: SourceError, for quantised weights too.
    """
    if not (folder / "config.json").exists():
        raise SourceError(
            f"{folder} has no config.json: give a folder written by save_pretrained, or a hub name"
        )
    read_json(folder / "config.json")
    with reading(folder, "config.json"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        method = _quantisation(config)
        for key, value in [*config.to_dict().items(), *text_config(config).to_dict().items()]:
            if (
                isinstance(value, int)
                and value > MOST_LAYERS
                and any(word in key for word in ("layer", "expert"))
            ):
                raise SourceError(
                    f"{folder / 'config.json'}: {key} is {value}, more than any model has: copy the model "
                    f"again"
                )
    if method:
        raise SourceError(
            f"{folder} is quantised ({method}): training, hashing and export need its whole weights; take "
            f"the "
            "unquantised model, or load it dequantised with transformers and save_pretrained it"
        )
    return config


def _quantisation(config: PretrainedConfig) -> str | None:
    """The method by which a model, or a part of it, is quantised; None where it is not."""
    for part in (config, config.get_text_config()):
        given = getattr(part, "quantization_config", None)
        if given:
            given = given if isinstance(given, dict) else given.to_dict()
            return str(
                given.get("quant_method")
                or next((key for key in given if key.startswith("load_in_")), "unknown method")
            )
    return None


def preprocessor_settings(folder: Path | None) -> dict:
    """Return the feature extractor's settings of a model folder; {} where it has none. Errors:
    SourceError."""
    if folder is None:
        return {}
    if (folder / "preprocessor_config.json").exists():
        return read_json(folder / "preprocessor_config.json")
    if (folder / "processor_config.json").exists():
        section = read_json(folder / "processor_config.json").get("feature_extractor", {})
        if not isinstance(section, dict):
            raise SourceError(
                f"{folder / 'processor_config.json'}: 'feature_extractor' is not an object: copy the model "
                f"again"
            )
        return section
    return {}


def locate(name: str, *, sizes_only: bool = False, fetch: bool = True) -> Source:
    """Find a model by folder, hub name or preset name.

    With `sizes_only`, a preset is enough and nothing is fetched. Otherwise a hub name is taken from the local
    hub cache, or downloaded where the machine may (HF_HUB_OFFLINE decides) and `fetch` allows it. Errors:
    SourceError.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return Source(name, read_config(folder), folder)
    preset = _preset(name)
    if sizes_only and preset:
        return Source(name, AutoConfig.for_model(**preset["config"]), None)
    if name.startswith((".", "/", "~")):
        where = (
            "" if folder.is_absolute() else f" in {Path.cwd()} (a relative path starts at the working folder)"
        )
        raise SourceError(f"model folder {name} does not exist{where}")
    repository = preset["names"][0] if preset and "/" not in name else name
    try:
        folder = hub_folder(repository, ["config.json"] if sizes_only else _FILES, fetch=fetch)
    except NotOnHub as error:
        if "/" not in repository:  # no repository of the hub that a recipe could mean
            near = did_you_mean(near_names(name, presets()))
            raise SourceError(
                f"model '{name}' is neither a folder, a known size nor in the hub cache"
                f"{f', {near}' if near else ''}; give a folder, a hub name (OWNER/NAME), or a known size: "
                f"{', '.join(presets())}"
            ) from None
        advice = f"fetch it on a machine with network (hf download {repository}) or give a folder"
        if sizes_only:
            advice = (
                f"fetch its sizes on a machine with network (hf download {repository} config.json), give a "
                f"folder with its config.json, or a known size: {', '.join(presets())}"
            )
        raise SourceError(
            f"model '{name}' is neither a folder nor in the hub cache ({error}); {advice}"
        ) from None
    return Source(name, read_config(folder), None if sizes_only else folder)


class NotOnHub(Exception):
    """A repository that is neither in the hub cache nor can be fetched; the reason in one line."""


def hub_folder(repository: str, patterns: list[str] = _FILES, *, fetch: bool = True) -> Path:
    """Return the folder of a hub repository: from the local cache, or downloaded where the machine may
    (HF_HUB_OFFLINE decides) and `fetch` allows it. Errors: NotOnHub."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, allow_patterns=patterns, local_files_only=not fetch))
    except Exception as error:  # the hub client's errors have many types; all mean that it cannot be had
        raise NotOnHub(one_line(error)) from None


def tensor_files(folder: Path) -> dict[str, Path]:
    """Tensor name -> safetensors file of a model folder, sharded or not. Errors: SourceError, where a file is
    missing or cut."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        single = folder / "model.safetensors"
        if not single.exists():
            raise SourceError(
                f"{folder} has no model.safetensors: save the model with save_pretrained (safetensors) first"
            )
        return dict.fromkeys(_tensor_names(single), single)
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise SourceError(f"{index} has no weight_map: copy the model again")
    for file in files.values():
        try:
            plain_name(file)
        except UnsafeName as error:
            raise SourceError(
                f"{index}: the file name {ascii(file)[:100]} {error}: copy the model again"
            ) from None
    absent = sorted({file for file in files.values() if not (folder / file).exists()})
    if absent:
        more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
        raise SourceError(
            f"{folder} is incomplete: {absent[0]}{more} of {index.name} is missing; copy the model again"
        )
    names_in = {file: _tensor_names(folder / file) for file in set(files.values())}
    for name, file in files.items():
        if name not in names_in[file]:
            raise SourceError(f"{folder} is incomplete: {file} does not hold '{name}'; copy the model again")
    return {name: folder / file for name, file in files.items()}


def _tensor_names(file: Path) -> set[str]:
    """Names of the tensors of a safetensors file. Errors: SourceError for one that is cut short or is
    none."""
    try:
        with safe_open(file, "pt") as opened:
            return set(opened.keys())
    except (SafetensorError, OSError) as error:
        raise SourceError(
            f"{file} is damaged or cut short ({one_line(error)}): copy the model again"
        ) from None


def read_tensor(folder: Path, name: str) -> torch.Tensor:
    files = tensor_files(folder)
    if name not in files:
        raise SourceError(f"{folder} holds no tensor '{name}'")
    with reading(files[name], f"tensor '{name}'"), safe_open(files[name], "pt") as file:
        return file.get_tensor(name)


def write_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write a safetensors file that others may read as the umask says: safetensors itself makes it 0600."""
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o666 & ~_umask())


def _umask() -> int:
    """Return this process's umask without changing it, as os.umask would for a moment in all threads
    (proc(5))."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("Umask:")), 8)


def causal_lm_class(config: PretrainedConfig) -> Callable[[PretrainedConfig], PreTrainedModel]:
    """Return the class of an LLM itself: from_config would shard and initialise a model without weights while
    ZeRO-3 is being set up. Errors: SourceError for a model that is no causal LLM."""
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise SourceError(
            f"a '{config.model_type}' model is no LLM that transformers' AutoModelForCausalLM loads: choose "
            "a text LLM, or save this model's text part with save_pretrained"
        )
    return cast(Any, AutoModelForCausalLM._model_mapping[type(config)])


def embedding_names(config: PretrainedConfig) -> tuple[str, str, float]:
    """(input embeddings' name, output embeddings' name, factor on the input embeddings), found on a
    weightless model.

    Tied models have one name for both. The factor is that of embeddings that scale what they look up (Gemma
    3).
    """
    with torch.device("meta"):
        model = causal_lm_class(config)(config)
    model.tie_weights()
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    by_parameter = {id(p): n for n, p in model.named_parameters()}
    scale = getattr(embedding, "scalar_embed_scale", None) or getattr(embedding, "embed_scale", None)
    scale = 1.0 if scale is None or torch.is_tensor(scale) else float(scale)
    return by_parameter[id(embedding.weight)], by_parameter[id(head.weight)], scale


def output_embeddings(source: Source, dtype: torch.dtype) -> torch.Tensor:
    """The LLM's output embeddings [V, D] (the input embeddings where the LLM ties them), read without the
    rest of it."""
    return read_tensor(source.files, embedding_names(source.config)[1]).to(dtype)


def embedding_statistics(source: Source) -> tuple[float, float]:
    """Root mean square of the input embeddings (the scale of the space that the LLM's first layer expects)
    and of the output embeddings (the scale of CTC's target space), from the files, a block of rows at a time
    (the table of an 8B model is 1 GB)."""
    input_name, output_name, scale = embedding_names(source.config)
    files = tensor_files(source.files)
    mean_square = {}
    for name in dict.fromkeys((input_name, output_name)):
        if name not in files:
            raise SourceError(f"{source.folder} holds no tensor '{name}'")
        with reading(files[name], f"embeddings '{name}'"), safe_open(files[name], "pt") as file:
            rows = file.get_slice(name)
            size, width = rows.get_shape()
            squares = 0.0
            for start in range(0, size, 16384):
                squares += float(rows[start : start + 16384].float().square().sum(dtype=torch.float64))
            mean_square[name] = squares / (size * width)
    return scale * mean_square[input_name] ** 0.5, mean_square[output_name] ** 0.5


def fingerprint(folder: Path, prefix: str = "") -> str:
    """sha256 over names, types, shapes and bytes of the tensors under `prefix`, in name order.

    It is the same however the tensors are spread over files, with whatever metadata, and whether or not the
    prefix was already stripped (a Whisper folder that holds its encoder alone has the encoder's fingerprint).
    """
    files = tensor_files(folder)
    chosen = [n for n in files if prefix and prefix in n] or list(files)
    spans: dict[str, tuple[Path, int, int, dict]] = {}
    for path in sorted(set(files[n] for n in chosen)):
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        for name, entry in header.items():
            if name != "__metadata__" and name in files:
                begin, end = entry["data_offsets"]
                spans[name] = (path, 8 + size + begin, end - begin, entry)
    digest = hashlib.sha256()
    for short, name in sorted((n.split(prefix, 1)[1] if prefix and prefix in n else n, n) for n in chosen):
        path, offset, size, entry = spans[name]
        digest.update(f"{short} {entry['dtype']} {entry['shape']}\n".encode())
        with open(path, "rb") as file:
            file.seek(offset)
            while size:
                block = file.read(min(size, 1 << 24))
                digest.update(block)
                size -= len(block)
    return digest.hexdigest()


def attention_implementation(setting: str, dtype: torch.dtype) -> str | None:
    """`auto`: flash_attention_2 where it imports, there is a GPU and the weights are 16-bit (it has no fp32);
    else None: sdpa where the model has it (Gemma 2 has not). Errors: OptionError for a setting that is not
    known."""
    if setting not in ("auto", "flash_attention_2", "sdpa", "eager"):
        raise OptionError(
            f"model.attention_implementation is '{setting}': auto, flash_attention_2, sdpa or eager"
        )
    if setting != "auto":
        return setting
    from transformers.utils import is_flash_attn_2_available

    half = dtype in (torch.bfloat16, torch.float16)
    return "flash_attention_2" if half and torch.cuda.is_available() and is_flash_attn_2_available() else None
