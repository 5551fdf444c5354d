"""Convert the official checkpoint's layout into ours, and ours into the official one.

Their checkpoint is one state dict. What stands where:

    theirs                                            ours
    model.{embed_tokens,layers,norm}, lm_head         llm/ (a plain Llama folder; LoRA is merged in
                                                      theirs)
    model.audio_tower.*                               encoder/ (a Whisper folder), where the checkpoint holds
                                                      it
    model.mm_projector1                               alignment.projection
    model.asr_transformer_encoder.layers.N            alignment.layers.N
        self_attn.{in_proj_weight,in_proj_bias}           qkv
        self_attn.out_proj, linear1, linear2, norm1/2     out, up, down, norm1/2
    model.out_norm                                    alignment.norm
    model.audio_feature_head.weight                   ctc_head.weight (blank: the row of <audio_patch>)
    model.lbm.encoder_attn.in_proj_*                  shrinking.query (first third), shrinking.key_value (the
                                                      others)
    model.lbm.encoder_attn.out_proj                   shrinking.out
    model.lbm.atten_layer_norm                        shrinking.norm

Tensors are read one at a time and written shard by shard: at no moment does more than one shard lie in
memory.
"""

from __future__ import annotations

import json
import operator
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tqdm import tqdm
from transformers import AutoTokenizer, LlamaConfig

from core.console import one_line
from model import identity
from model.artifact import ADAPTERS, CONFIG, LORA, TUNED, FolderError, describe, read_config, tuned_parts
from model.config import SoundwaveConfig, official_switches
from model.language_model import audio_token_id, load_tokenizer
from model.lora_start import scale_of
from model.pretrained import (
    NotOnHub,
    Source,
    SourceError,
    embedding_names,
    fingerprint,
    hub_folder,
    locate,
    read_json,
    read_tensor,
    reading,
    tensor_files,
    write_tensors,
)
from model.saved_modules import replaces_output_table
from model.stages import SFT, STAGES
from model.trained_encoder import merged_tensors

SHARD_BYTES = 1 << 30
MAPPED_BYTES = 1 << 30  # of a file that is read, before its pages are given back
_DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
# Ours -> theirs, under `alignment.` and `shrinking.`; the look-back's joint projection is treated apart.
_NAMES = {
    r"alignment\.projection\.": "model.mm_projector1.",
    r"alignment\.norm\.": "model.out_norm.",
    r"alignment\.layers\.(\d+)\.qkv\.": r"model.asr_transformer_encoder.layers.\1.self_attn.in_proj_",
    r"alignment\.layers\.(\d+)\.out\.": r"model.asr_transformer_encoder.layers.\1.self_attn.out_proj.",
    r"alignment\.layers\.(\d+)\.up\.": r"model.asr_transformer_encoder.layers.\1.linear1.",
    r"alignment\.layers\.(\d+)\.down\.": r"model.asr_transformer_encoder.layers.\1.linear2.",
    r"alignment\.layers\.(\d+)\.norm([12])\.": r"model.asr_transformer_encoder.layers.\1.norm\2.",
    r"ctc_head\.weight": "model.audio_feature_head.weight",
    r"shrinking\.out\.": "model.lbm.encoder_attn.out_proj.",
    r"shrinking\.norm\.": "model.lbm.atten_layer_norm.",
}
_ENCODER = "model.audio_tower."
_JOINT = "model.lbm.encoder_attn.in_proj_"
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "tokenizer.model",
)


class ShardWriter:
    """safetensors shards with transformers' index, one shard in memory at a time."""

    def __init__(self, folder: Path, limit: int | None = None):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.limit = folder, limit or SHARD_BYTES
        self.pending: dict[str, torch.Tensor] = {}
        self.size = self.total = 0
        self.shards: list[list[str]] = []

    def add(self, name: str, tensor: torch.Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        if self.pending and self.size + size > self.limit:
            self._flush()
        self.pending[name] = tensor.contiguous()
        self.size += size
        self.total += size

    def _flush(self) -> None:
        write_tensors(self.pending, self.folder / f"part-{len(self.shards)}")
        self.shards.append(list(self.pending))
        self.pending, self.size = {}, 0

    def close(self) -> None:
        self._flush()
        count, index = len(self.shards), {}
        for i, names in enumerate(self.shards):
            file = "model.safetensors" if count == 1 else f"model-{i + 1:05d}-of-{count:05d}.safetensors"
            (self.folder / f"part-{i}").rename(self.folder / file)
            index.update({name: file for name in names})
        if count > 1:
            (self.folder / "model.safetensors.index.json").write_text(
                json.dumps({"metadata": {"total_size": self.total}, "weight_map": index}, indent=2) + "\n"
            )


def stream_tensors(folder: Path, progress: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors of a folder, one at a time, file by file."""
    files: dict[Path, list[str]] = {}
    for name, path in tensor_files(folder).items():
        files.setdefault(path, []).append(name)
    with tqdm(total=sum(map(len, files.values())), desc=progress, unit="tensor") as bar:
        for path, names in sorted(files.items()):
            while names:
                read = 0
                with safe_open(path, "pt") as file:  # closing it unmaps what was read
                    while names and read < MAPPED_BYTES:
                        name = names.pop(0)
                        tensor = file.get_tensor(name)
                        read += tensor.nbytes
                        yield name, tensor
                        bar.update()


def from_official(folder: str | Path, out: str | Path, *, encoder: str | None = None) -> Path:
    """Convert the official checkpoint's folder, or hub name, to a model folder of ours with its LLM (and
    encoder, if it holds one) inside.

    encoder: Whisper's folder or hub name where the checkpoint has no `audio_tower` tensors (default: what its
    config names).
    Errors: FolderError for a tokenizer that is missing or lacks `<audio_patch>`, and for tensors that are
    missing or unknown; SourceError for a name that is no folder and cannot be fetched.
    """
    checkpoint = _located(str(folder))
    with reading(checkpoint, "the official layout"):
        return _from_official(checkpoint, Path(out), encoder)


def _located(name: str) -> Path:
    """Return the folder of the official checkpoint, a hub name's from the cache or fetched. Errors:
    SourceError."""
    folder = Path(name).expanduser()
    if folder.exists():
        return folder
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise SourceError(f"{name} does not exist: give the official checkpoint's folder, or its hub name")
    try:
        return hub_folder(name)
    except NotOnHub as error:
        raise SourceError(
            f"'{name}' is neither a folder nor in the hub cache ({error}); fetch it on a machine with "
            f"network (hf download {name}) or give a folder"
        ) from None


def _from_official(folder: Path, out: Path, encoder: str | None) -> Path:
    theirs = read_json(folder / "config.json")
    config = official_switches(SoundwaveConfig())
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise FolderError(
            f"{folder} has no tokenizer that loads ({one_line(error)}): "
            "copy the official checkpoint's tokenizer files there"
        ) from None
    if config.audio_token not in tokenizer.get_vocab():
        raise FolderError(
            f"the tokenizer in {folder} has no {config.audio_token}: it is not the official one"
        )

    back = {theirs_name: ours for ours, theirs_name in _expected_names(theirs).items()}
    adapters: dict[str, torch.Tensor] = {}
    llm, tower = ShardWriter(out / "llm"), {}
    for name, tensor in stream_tensors(folder, "converting"):
        if name in back:
            adapters[back.pop(name)] = tensor
        elif name.startswith(_JOINT):
            kind, width = name.removeprefix(_JOINT), tensor.shape[0] // 3
            adapters[f"shrinking.query.{kind}"] = tensor[:width].clone()
            adapters[f"shrinking.key_value.{kind}"] = tensor[width:].clone()
            config.dtype = _DTYPE_NAMES[tensor.dtype]
        elif name.startswith(_ENCODER):
            tower["model.encoder." + name.removeprefix(_ENCODER)] = tensor
        elif re.match(r"model\.(embed_tokens|layers|norm)\.|lm_head\.", name):
            llm.add(name, tensor)
        else:
            raise FolderError(f"{folder} holds '{name}', which is no part of the official layout")
    if back or "shrinking.query.weight" not in adapters:
        raise FolderError(
            f"{folder} lacks {sorted(back)[0] if back else _JOINT + 'weight'}: it is not the official layout"
        )
    llm.close()
    _llm_config(theirs).save_pretrained(out / "llm")
    for file in (*_TOKENIZER_FILES, "generation_config.json"):
        if (folder / file).exists():
            shutil.copyfile(folder / file, out / "llm" / file)

    named = theirs.get("audio_tower", "")
    beside = folder / named  # an absolute name, or one that leads out of the folder, is not read from there
    if Path(named).is_absolute() or ".." in Path(named).parts:
        beside = folder / "encoder"
    if tower and encoder is None:
        (out / "encoder").mkdir(parents=True, exist_ok=True)
        write_tensors(tower, out / "encoder" / "model.safetensors")
        source = beside if named and (beside / "config.json").exists() else folder / "encoder"
        if not (source / "config.json").exists():
            raise FolderError(
                f"{folder} holds an encoder's weights but no encoder/config.json: give --encoder"
            )
        shutil.copyfile(source / "config.json", out / "encoder" / "config.json")
        config.encoder.name = "encoder"
    else:
        config.encoder.name = _anywhere(encoder or (str(beside) if named and beside.is_dir() else named))
    config.llm.name, config.llm.lora_r = "llm", 0
    write_tensors(adapters, out / ADAPTERS)
    sources = {
        "encoder": locate(str(out / "encoder") if config.encoder.name == "encoder" else config.encoder.name),
        "llm": locate(str(out / "llm")),
    }
    frozen = {"encoder": fingerprint(sources["encoder"].files, "encoder."), "llm": fingerprint(out / "llm")}
    settings = identity.settings(sources, load_tokenizer(sources["llm"], config.audio_token))
    (out / CONFIG).write_text(
        json.dumps(
            {
                "config": asdict(config),
                "stage": SFT.name,
                "frozen": frozen,
                "settings": settings,
                "origin": "official checkpoint",
            },
            indent=2,
            ensure_ascii=False,
        )
        + "\n"
    )
    return out


def _anywhere(name: str) -> str:
    """Return a folder's absolute path, so that it is found from any folder; a hub name as it is."""
    folder = Path(name).expanduser()
    return str(folder.resolve()) if name and folder.is_dir() else name


def _expected_names(theirs: dict) -> dict[str, str]:
    """Our names -> theirs, for what has a tensor of its own in both; theirs has one Transformer
    layer."""
    ours = ["alignment.projection", "alignment.norm", "shrinking.out", "shrinking.norm"]
    ours += [f"alignment.layers.0.{part}" for part in ("qkv", "out", "up", "down", "norm1", "norm2")]
    return {
        name: their_name(name)
        for name in [f"{part}.{kind}" for part in ours for kind in ("weight", "bias")] + ["ctc_head.weight"]
    }


def their_name(name: str) -> str:
    """Our adapter tensor's name -> the official one."""
    for pattern, replacement in _NAMES.items():
        if re.match(pattern, name):
            return re.sub("^" + pattern, replacement, name)
    raise FolderError(f"'{name}' has no place in the official layout")


def _llm_config(theirs: dict) -> LlamaConfig:
    """Their config without what is theirs: a plain Llama's."""
    extra = {
        "adapter_size",
        "audio_tower",
        "audio_patch_size",
        "audio_patch_token",
        "llm_pad_token_id",
        "model_type",
        "architectures",
        "_name_or_path",
        "transformers_version",
        "torch_dtype",
    }
    return LlamaConfig(
        **{k: v for k, v in theirs.items() if k not in extra}, architectures=["LlamaForCausalLM"]
    )


# What the authors' code does for any weights: (setting, value).
_FIXED = (
    ("alignment.attention", "frame"),
    ("alignment.stack_frames", 2),
    ("alignment.layers", 1),
    ("alignment.ffn_multiple", 2.0),
    ("alignment.heads", None),
    ("compressor", "ctc_peaks"),
    ("shrinking.heads", None),
    ("shrinking.enabled", True),
    ("shrinking.keep", "first"),
    ("shrinking.keep_blank_runs", True),
    ("shrinking.lookback", "kept"),
    ("shrinking.token_embeddings", False),
    ("encoder.pad_to_seconds", 30.0),
    ("alignment.ctc_length", "full"),
    ("prompt", "release"),
    ("system_prompt", None),
)


def _check_convertible(run: Path, config: SoundwaveConfig) -> None:
    """Errors: FolderError for a folder that the official layout cannot hold."""
    if not STAGES[describe(run)["stage"]].needs_llm:
        raise FolderError(
            f"{run} is a stage 1 folder: the official layout holds all parts, give one of stage 2 or 3"
        )
    for key, value in _FIXED:
        have = operator.attrgetter(key)(config)
        if have != value:
            raise FolderError(
                f"{run} has model.{key} = {have}, the authors' code knows {value} only: "
                "its answers would not be this model's"
            )


def _add_llm(writer: ShardWriter, run: Path, llm: Source, rows: int) -> torch.Tensor | None:
    """Write the LLM's tensors, LoRA merged, tables of `rows` rows. Return the output embeddings as they were;
    None where the LLM has none."""
    output_table = None
    for name, tensor in stream_llm(run, llm):
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            table, tensor = tensor, grow(tensor, rows)
            if name == "lm_head.weight" or llm.config.tie_word_embeddings:
                output_table = table
            if llm.config.tie_word_embeddings and name == "model.embed_tokens.weight":
                writer.add("lm_head.weight", tensor.clone())
        if name != "lm_head.weight" or not llm.config.tie_word_embeddings:
            writer.add(name, tensor)
    if replaces_output_table(run, llm):  # the CTC head's targets are the original ones
        return read_tensor(llm.files, embedding_names(llm.config)[1])
    return output_table


def _add_adapters(
    writer: ShardWriter, run: Path, output_table: torch.Tensor | None, rows: int, audio_id: int
) -> None:
    """Write the adapters and the CTC head under the official names."""
    adapters = load_file(run / ADAPTERS)
    blank_row = adapters.pop("ctc_head.blank_row", None)
    if blank_row is not None and output_table is not None:
        head = grow(output_table, rows)
        head[audio_id] = blank_row.to(head.dtype)
        adapters["ctc_head.weight"] = head
    adapters["ctc_head.weight"] = grow(adapters["ctc_head.weight"], rows)
    for kind in ("weight", "bias"):
        joint = torch.cat(
            [adapters.pop(f"shrinking.query.{kind}"), adapters.pop(f"shrinking.key_value.{kind}")]
        )
        writer.add(_JOINT + kind, joint)
    for name, tensor in adapters.items():
        writer.add(their_name(name), tensor)


def to_official(run: str | Path, out: str | Path) -> Path:
    """Write a model folder in the official layout: names, config, tokenizer with `<audio_patch>`; LoRA
    merged.

    Tables grow to hold `<audio_patch>`; a tied CTC head is written out with its blank row; tied embeddings
    are written twice. The encoder's tensors stand under `model.audio_tower`, its configuration in encoder/.
    Errors: FolderError for a stage 1 folder, an LLM that is no Llama, and for options that the authors'
    code does not have.
    """
    run, out = Path(run), Path(out)
    config = read_config(run)
    _check_convertible(run, config)
    llm, encoder = locate(config.llm.name), locate(config.encoder.name)
    if llm.config.model_type != "llama":
        raise FolderError(
            f"{llm.name} is a '{llm.config.model_type}' model; the official layout takes Llama only"
        )
    tokenizer = load_tokenizer(llm, config.audio_token)
    audio_id = audio_token_id(tokenizer, config.audio_token)
    if tokenizer.pad_token_id is None:  # the authors' code finds padding by a token of its own
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
    rows = max(llm.config.vocab_size, len(tokenizer))

    writer = ShardWriter(out)
    output_table = _add_llm(writer, run, llm, rows)
    _add_adapters(writer, run, output_table, rows, audio_id)
    tuned: dict[str, torch.Tensor] = {}
    if "encoder" in tuned_parts(run):
        tuned = merged_tensors(config.encoder, encoder, config.dtype, run / TUNED["encoder"])
    for name, tensor in stream_tensors(encoder.files, "copying the encoder"):
        if "encoder." in name and "decoder." not in name:
            plain = name.split("encoder.", 1)[1]
            writer.add(_ENCODER + plain, tuned.get(f"layers.{plain}", tensor))
    writer.close()

    theirs = _their_config(llm, encoder, rows, audio_id, tokenizer.pad_token_id)
    (out / "config.json").write_text(json.dumps(theirs, indent=1) + "\n")
    tokenizer.save_pretrained(out)
    _write_tokenizer_for_transformers_4(out)
    (out / "encoder").mkdir(exist_ok=True)
    shutil.copyfile(encoder.files / "config.json", out / "encoder" / "config.json")
    if (llm.files / "generation_config.json").exists():
        shutil.copyfile(llm.files / "generation_config.json", out / "generation_config.json")
    return out


def _write_tokenizer_for_transformers_4(folder: Path) -> None:
    """What transformers 5 wrote, in the words of 4.43 (tokenizers 0.19): its class, the template inside the
    settings, each merge as one string."""
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings.pop("backend", None)
    template = folder / "chat_template.jinja"
    if template.exists():
        settings["chat_template"] = template.read_text()
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
    backend = json.loads((folder / "tokenizer.json").read_text())
    merges = backend["model"].get("merges", [])
    backend["model"]["merges"] = [pair if isinstance(pair, str) else " ".join(pair) for pair in merges]
    (folder / "tokenizer.json").write_text(json.dumps(backend, ensure_ascii=False))


def grow(table: torch.Tensor, rows: int) -> torch.Tensor:
    """A table with more rows; the new ones are the mean of the old."""
    if table.shape[0] >= rows:
        return table.clone()
    mean = table.float().mean(0, keepdim=True).to(table.dtype)
    return torch.cat([table, mean.expand(rows - table.shape[0], -1)])


def stream_llm(run: Path, llm: Source) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors of a model folder's LLM as it was trained: those of llm.safetensors in place of the base's,
    LoRA merged. Errors: FolderError for trained tensors that the base's files do not hold."""
    merge = LoRAMerge(run / LORA) if (run / LORA).is_dir() else None
    tuned = {}
    if "llm" in tuned_parts(run):
        tuned = {name.removeprefix("llm."): value for name, value in load_file(run / TUNED["llm"]).items()}
    for name, tensor in stream_tensors(llm.files, "merging the LLM"):
        tensor = tuned.pop(name, tensor)
        yield name, merge(name, tensor) if merge else tensor
    if tuned:
        raise FolderError(
            f"{run} has trained '{next(iter(tuned))}', which the files of {llm.folder} name otherwise: save "
            "the base model anew with transformers' save_pretrained, and train from that"
        )
    if merge:
        merge.check_all_used()


class LoRAMerge:
    """Base tensor + scale x B A, one tensor at a time, from a peft folder; of DoRA with its row norms; of
    layers that were trained whole the trained tensor."""

    def __init__(self, folder: Path):
        settings = read_json(folder / "adapter_config.json")
        self.folder = folder
        self.parts: dict[str, dict[str, torch.Tensor]] = {}
        self.whole: dict[str, torch.Tensor] = {}  # trained copies of whole layers
        copies = tuple(f"base_model.model.{name}." for name in settings.get("modules_to_save") or [])
        with reading(folder, "LoRA"):
            self.settings = settings
            self.transposed = settings.get("fan_in_fan_out", False)  # GPT-2 holds its weights so
            for name, tensor in load_file(folder / "adapter_model.safetensors").items():
                match = re.fullmatch(
                    r"base_model\.model\.(.*)\.lora_(A(?=\.weight)|B(?=\.weight)|magnitude_vector)(\.weight)?",
                    name,
                )
                if match is None and name.startswith(copies):
                    self.whole[name.removeprefix("base_model.model.")] = tensor
                    continue
                if match is None:
                    raise FolderError(f"{folder} holds '{name}', which is no LoRA weight: merge it with peft")
                self.parts.setdefault(match[1] + ".weight", {})[match[2]] = tensor.float()

    def __call__(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        if (copy := self.whole.pop(name, None)) is not None:
            return copy.to(tensor.dtype)
        pair = self.parts.pop(name, None)
        if pair is None:
            return tensor
        layer, rank = name.removesuffix(".weight"), pair["A"].shape[0]
        change = scale_of(self.settings, layer, rank) * (pair["B"] @ pair["A"])
        merged = (tensor.T if self.transposed else tensor).float() + change
        if "magnitude_vector" in pair:  # DoRA
            merged *= (pair["magnitude_vector"] / merged.norm(dim=1))[:, None]
        return (merged.T if self.transposed else merged).to(tensor.dtype).contiguous()

    def check_all_used(self) -> None:
        if left := [*self.parts, *self.whole]:
            raise FolderError(f"{self.folder} has trained '{left[0]}', which the LLM does not hold")


def _their_config(llm: Source, encoder: Source, rows: int, audio_id: int, pad_id: int) -> dict:
    """A config.json that transformers 4.43, which the authors' code was written for, understands."""
    raw = read_json(llm.files / "config.json")
    rope = raw.pop("rope_parameters", None)
    if rope:  # written by transformers 5
        scaling = {k: v for k, v in rope.items() if k != "rope_theta"}
        raw["rope_theta"] = rope.get("rope_theta", 10000.0)
        raw["rope_scaling"] = scaling if scaling.get("rope_type", "default") != "default" else None
    if "dtype" in raw:
        raw["torch_dtype"] = raw.pop("dtype")
    encoder_width = encoder.config.d_model
    named = encoder.name if not Path(encoder.name).exists() else "encoder"
    raw.update(
        model_type="Soundwave",
        architectures=["SoundwaveForCausalLM"],
        vocab_size=rows,
        tie_word_embeddings=False,
        adapter_size=encoder_width,
        audio_tower=named,
        audio_patch_size=1,
        audio_patch_token=audio_id,
        llm_pad_token_id=pad_id,
    )
    return raw
