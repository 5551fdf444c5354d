"""Export a stage's model for transformers, peft and vLLM.

    python -m model.export RUN --out DIR [--merge] [--with-encoder]

    README.md                model card: method, recipe, data and hours, hashes of the frozen parts, scores
    config.json              for AutoModel (`import model.auto` registers it)
    soundwave.json, adapters.safetensors   the model folder (model/artifact.py), with trained tensors of
                             encoder and LLM in files of their own
    lora/                    LoRA that plain peft loads onto the base      (not with --merge)
    llm/                     the LLM with LoRA merged, a folder of its own  (with --merge)
    encoder/                 the frozen encoder                            (with --with-encoder)
    tokenizer files, chat template, generation_config.json

With --hub-layout the folder is one that plain transformers loads, without this project (model/hub/layout.py).

RUN is a model folder (<output>/<stage>/model) or the stage's folder. Scores are those that evaluation.run
left in RUN's model/evaluation/. Nothing of RUN is changed.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

from core.command_line import CommandParser
from model import identity
from model.artifact import (
    ADAPTERS,
    CONFIG,
    LORA,
    TUNED,
    FolderError,
    describe,
    identity_differences,
    read_config,
    trained_with,
)
from model.auto import SoundwaveHubConfig
from model.encoder import tensor_prefix
from model.hub.layout import write_layout
from model.language_model import end_ids, end_settings, load_tokenizer
from model.model_card import model_card
from model.official import ShardWriter, stream_llm
from model.pretrained import Source, SourceError, fingerprint, locate
from model.saved_modules import replaces_output_table
from model.stages import STAGES


def export(
    run: str | Path,
    out: str | Path,
    *,
    merge: bool = False,
    with_encoder: bool = False,
    hub_layout: bool = False,
) -> Path:
    """Write the export (see the module's docstring).

    Errors: FolderError for what is no model folder of stage 2 or 3, for an `out` that holds something, and
    for a frozen part that is not the one trained with; SourceError where one is not found.
    """
    run, out = Path(run), Path(out)
    run = run / "model" if (run / "model" / CONFIG).exists() else run
    description, config = describe(run), read_config(run)
    if not STAGES[description["stage"]].needs_llm:
        raise FolderError(f"{run} is a stage 1 folder: it has no LLM that answers; export stage 2 or 3")
    if out.exists() and any(out.iterdir()):
        raise FolderError(f"{out} is not empty: give a new folder")
    encoder, llm = locate(config.encoder.name), locate(config.llm.name)
    if (merge or hub_layout) and config.alignment.ctc_head == "tied" and replaces_output_table(run, llm):
        raise FolderError(
            f"{run}: its CTC head is tied to the LLM's original output embeddings, and "
            "model.llm.lora_modules_to_save has trained others, which a merged LLM would hold in their "
            "place: export without --merge and --hub-layout"
        )
    tokenizer = load_tokenizer(llm, config.audio_token)
    frozen = {"encoder": fingerprint(encoder.files, tensor_prefix(encoder)), "llm": fingerprint(llm.files)}
    settings = identity.settings({"encoder": encoder, "llm": llm}, tokenizer)
    for text in identity_differences(
        run, frozen, settings, {"encoder": encoder.files, "llm": llm.files}
    ).values():
        raise FolderError(text)
    out.mkdir(parents=True, exist_ok=True)
    names = {"encoder": encoder.name, "llm": llm.name}
    generation = _generation_config(tokenizer, config.prompt, llm)
    for folder in [out, *([out / "llm"] if merge and not hub_layout else [])]:
        folder.mkdir(exist_ok=True)
        tokenizer.save_pretrained(folder)
        generation.save_pretrained(folder)
    has_lora = (run / LORA).is_dir()
    if merge or hub_layout:
        config.llm.quantization = "none"  # LoRA is merged into the unquantised weights
    if hub_layout:
        write_layout(run, out, config, encoder, llm, tokenizer)
        names = {part: Path(name).name if Path(name).exists() else name for part, name in names.items()}
        card = model_card(run, description, names, frozen, merged=True, has_lora=has_lora, hub_layout=True)
        (out / "README.md").write_text(card)
        return out
    shutil.copyfile(run / ADAPTERS, out / ADAPTERS)
    tuned = [part for part in description.get("tuned", []) if part != "llm" or not merge]
    for part in tuned:
        shutil.copyfile(run / TUNED[part], out / TUNED[part])
    if merge:
        _write_llm(run, llm, out / "llm")
        config.llm.name, config.llm.lora_r, frozen["llm"] = "llm", 0, fingerprint(out / "llm")
    elif has_lora:
        shutil.copytree(run / LORA, out / LORA, copy_function=shutil.copyfile)  # contents, not modes
    if with_encoder:
        _copy_encoder(encoder, out / "encoder")
        config.encoder.name = "encoder"
    if merge:
        inside = locate(str(out / "llm"))
        settings = identity.settings(
            {"encoder": encoder, "llm": inside}, load_tokenizer(inside, config.audio_token)
        )
    written = {
        "config": asdict(config),
        "stage": description["stage"],
        "frozen": frozen,
        "settings": settings,
        **({"tuned": tuned} if tuned else {}),
    }
    # What inference asks for (the joint search, the warning about long audio); the rest is the trainer's own.
    if data := {
        key: value for key, value in trained_with(description).items() if key in ("ctc_text", "max_seconds")
    }:
        written["recipe"] = {"data": data}
    (out / CONFIG).write_text(json.dumps(written, indent=2, ensure_ascii=False) + "\n")
    keys: dict[str, Any] = {
        "architectures": ["Soundwave"],
        "soundwave": asdict(config),
        "llm_config": llm.config.to_dict(),
        "encoder_config": encoder.config.to_dict(),
    }
    SoundwaveHubConfig(**keys).save_pretrained(out)
    (out / "README.md").write_text(
        model_card(run, description, names, frozen, merged=merge, has_lora=has_lora)
    )
    return out


def export_llm(run: str | Path, out: str | Path, llm: str | None = None) -> Path:
    """Write the LLM of a model folder with LoRA merged, as a folder that transformers and vLLM load.

    llm: its folder, where it is not where `run` names it. `out`: new or empty. Errors: FolderError,
    SourceError.
    """
    run, out = Path(run), Path(out)
    description, config = describe(run), read_config(run)
    if not STAGES[description["stage"]].needs_llm:
        raise FolderError(f"{run} is a stage 1 folder: it has no LLM that answers")
    if out.exists() and any(out.iterdir()):
        raise FolderError(f"{out} is not empty: give a new folder")
    source = locate(llm or config.llm.name)
    tokenizer = load_tokenizer(source, config.audio_token)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(out)
    _generation_config(tokenizer, config.prompt, source).save_pretrained(out)
    _write_llm(run, source, out)
    return out


def _generation_config(tokenizer: PreTrainedTokenizerBase, prompt: str, llm: Source) -> GenerationConfig:
    stop = end_ids(tokenizer, prompt, end_settings(llm))
    return GenerationConfig(
        eos_token_id=stop,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=stop[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        max_new_tokens=512,
        do_sample=False,
    )


def _write_llm(run: Path, llm: Source, out: Path) -> None:
    writer = ShardWriter(out)
    for name, tensor in stream_llm(run, llm):
        writer.add(name, tensor)
    writer.close()
    shutil.copyfile(llm.files / "config.json", out / "config.json")


def _copy_encoder(encoder: Source, out: Path) -> None:
    out.mkdir()
    for path in sorted(encoder.files.iterdir()):
        if path.is_file() and (
            path.suffix == ".safetensors"
            or path.name in ("config.json", "preprocessor_config.json", "model.safetensors.index.json")
        ):
            shutil.copyfile(path, out / path.name)


def main(arguments: list[str] | None = None) -> int:
    parser = CommandParser("python -m model.export", __doc__, example="runs/me/sft/model --out export")
    parser.add_argument("run", help="model folder of stage 2 or 3, or the stage's folder")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument(
        "--merge", action="store_true", help="merge LoRA into the LLM and put the whole LLM inside"
    )
    parser.add_argument("--with-encoder", action="store_true", help="put the frozen encoder inside, too")
    parser.add_argument(
        "--hub-layout",
        action="store_true",
        help="write what plain transformers loads without this project (model/hub/layout.py)",
    )
    options = parser.parse_args(arguments)
    if options.hub_layout and (options.merge or options.with_encoder):
        parser.error("--hub-layout merges LoRA and holds the encoder: leave --merge and --with-encoder out")
    try:
        out = export(
            options.run,
            options.out,
            merge=options.merge,
            with_encoder=options.with_encoder,
            hub_layout=options.hub_layout,
        )
    except (FolderError, SourceError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.hub_layout:
        print(f"{out}: transformers.AutoModel.from_pretrained('{out}', trust_remote_code=True)")
        return 0
    print(f"{out}: import model.auto; transformers.AutoModel.from_pretrained('{out}')")
    return 0


if __name__ == "__main__":
    sys.exit(main())
