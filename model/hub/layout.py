"""Write a finished run as a folder that plain transformers loads, without this project.

config.json, generation_config.json      with auto_map: AutoConfig, AutoModel, AutoProcessor
configuration_, modeling_, processing_soundwave.py   generated from this project (model/hub/bundle.py)
model.safetensors, or shards             everything: encoder, adapters, the LLM with LoRA merged
tokenizer files, processor_config.json
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from model.artifact import ADAPTERS, TUNED, FolderError
from model.config import SoundwaveConfig
from model.encoder import encoder_sizes
from model.hub.bundle import Place, bundle
from model.hub.configuration import SoundwaveHubConfig
from model.hub.modeling import SoundwaveForConditionalGeneration
from model.hub.processing import SoundwaveProcessor
from model.language_model import audio_token_id
from model.official import ShardWriter, stream_llm
from model.pretrained import DTYPES, Source, preprocessor_settings
from model.trained_encoder import merged_tensors

BESIDE = {"model.hub.configuration": "configuration_soundwave"}
#: Compiled and training-only parts, and what takes their place.
INSTEAD = {
    Place(module, name): Place("model.hub.plain", name)
    for module, name in (
        ("model.ops.linear_ctc", "linear_argmax"),
        ("model.ops.linear_ctc", "linear_ctc"),
        ("model.ops.align", "label_scores"),
        ("model.dropout", "KeyedDropout"),
        ("model.pretrained", "preprocessor_settings"),
        ("model.language_model", "base_of"),
        ("model.compressors.base", "compressor_of"),
        ("model.compressors.base", "register_compressor"),
    )
}
AUTO_MAP = {
    "AutoConfig": "configuration_soundwave.SoundwaveHubConfig",
    "AutoModel": "modeling_soundwave.SoundwaveForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_soundwave.SoundwaveForConditionalGeneration",  # pipeline's
    "AutoProcessor": "processing_soundwave.SoundwaveProcessor",
}


def source_files() -> dict[str, str]:
    """Name -> text of the generated files."""
    names = ("configuration", "modeling", "processing")
    beside: dict[str, dict[str, str]] = {"configuration": {}}
    return {
        f"{name}_soundwave.py": bundle(f"model.hub.{name}", beside=beside.get(name, BESIDE), instead=INSTEAD)
        for name in names
    }


def _sizes(config: PretrainedConfig) -> dict:
    """A network's configuration without its folder's name."""
    return {key: value for key, value in config.to_dict().items() if key != "_name_or_path"}


def write_layout(
    run: Path,
    out: Path,
    config: SoundwaveConfig,
    encoder: Source,
    llm: Source,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Write all but README.md, the tokenizer and generation_config.json. run: a model folder of stage 2 or
    3. Errors: FolderError for an LLM whose stored tensors have other names than its network."""
    adapters = load_file(run / ADAPTERS)
    rows = adapters["ctc_head.weight"].shape[0] if "ctc_head.weight" in adapters else 0
    switches = asdict(config)
    switches["encoder"]["lora_r"] = 0  # merged
    for part in ("encoder", "llm"):  # paths of this machine are not published
        if Path(switches[part]["name"]).exists():
            switches[part]["name"] = Path(switches[part]["name"]).name
    hub = SoundwaveHubConfig(
        soundwave=switches,
        encoder_config=_sizes(encoder_sizes(encoder.config)),
        llm_config=_sizes(llm.config),
        ctc_rows=rows,
        audio_token_id=audio_token_id(tokenizer, config.audio_token),
        normalise_waveforms=bool(preprocessor_settings(encoder.folder).get("do_normalize", True)),
        architectures=["SoundwaveForConditionalGeneration"],
        tie_word_embeddings=config.alignment.ctc_head == "tied",
        dtype=DTYPES[config.dtype],
        auto_map=AUTO_MAP,
    )
    with torch.device("meta"):
        network = SoundwaveForConditionalGeneration(hub)
    expected = set(network.state_dict()) - set(network.all_tied_weights_keys)
    writer, written = ShardWriter(out), set()

    def add(name: str, tensor: torch.Tensor) -> None:
        written.add(name)
        writer.add(name, tensor)

    for name, tensor in adapters.items():
        add(name, tensor)
    for name, tensor in merged_tensors(config.encoder, encoder, config.dtype, run / TUNED["encoder"]).items():
        add(f"encoder.{name}", tensor)
    for name, tensor in stream_llm(run, llm):
        if f"llm.{name}" in expected:
            add(f"llm.{name}", tensor)
        elif f"llm.{name}" not in network.all_tied_weights_keys:
            raise FolderError(
                f"{llm.folder}: its tensor '{name}' has another name in transformers' network: --hub-layout "
                "takes LLMs whose files have the network's own names; export without it"
            )
    writer.close()
    if lacking := sorted(expected - written):
        raise FolderError(f"{run}: the hub's network needs '{lacking[0]}', which its files lack")
    hub.save_pretrained(out)
    for name, text in source_files().items():
        (out / name).write_text(text, encoding="utf-8")
    processor = SoundwaveProcessor(
        tokenizer, audio_token=config.audio_token, prompt=config.prompt, system=config.system_prompt
    )
    processor.save_pretrained(out)
    settings = json.loads((out / "processor_config.json").read_text())
    settings["auto_map"] = {"AutoProcessor": AUTO_MAP["AutoProcessor"]}
    (out / "processor_config.json").write_text(json.dumps(settings, indent=2) + "\n")
