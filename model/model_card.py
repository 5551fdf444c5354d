"""The README.md of an exported model: filled in from its folder, its recipe, the packed data and its
scores."""

from __future__ import annotations

from pathlib import Path

import yaml

from core.console import one_line
from core.json_files import JsonError, read_object
from model.pretrained import SourceError

_MAIN_SCORES = ("wer", "cer", "bleu", "chrf", "accuracy", "exact")


def model_card(
    run: Path,
    description: dict,
    names: dict[str, str],
    frozen: dict[str, str],
    *,
    merged: bool,
    has_lora: bool,
) -> str:
    """run: the model folder; description: its soundwave.json; names: of the frozen parts; frozen: their
    sha256."""
    recipe = description.get("recipe") or {}
    corpora = [_corpus(c) for c in recipe.get("data", {}).get("train", [])]
    languages = sorted({lang for c in corpora for lang in c["languages"]})
    scores = _scores(run)
    header = {
        "library_name": "transformers",
        "pipeline_tag": "audio-text-to-text",
        "tags": ["speech", "audio", "soundwave"],
        "base_model": [names["llm"], names["encoder"]],
    }
    if languages:
        header["language"] = languages
    hours = sum(c["hours"] for c in corpora if c["hours"] is not None)
    lines = [
        "---",
        yaml.safe_dump(header, sort_keys=False, allow_unicode=True).strip(),
        "---",
        "",
        f"# Soundwave: {_short(names['encoder'])} + {_short(names['llm'])}",
        "",
        "A speech LLM made by the Soundwave method (Zhang et al., ACL 2025, arXiv 2502.12900): a frozen "
        "audio encoder, an "
        "alignment adapter trained with CTC over the LLM's vocabulary, a shrinking adapter, and an LLM with "
        "LoRA"
        + (
            ", merged here."
            if merged and has_lora
            else "."
            if has_lora
            else ", which this model goes without."
        ),
        "",
        "## Use",
        "",
        "```python",
        "import model.auto",
        "from transformers import AutoModel",
        "",
        'speech_llm = AutoModel.from_pretrained("THIS_FOLDER")',
        'chat = [{"role": "user", "content": "<audio_patch>\\nPlease transcribe the following audio."}]',
        "print(speech_llm.answer([chat], [waveform]))  # waveform: [samples] at 16 kHz",
        "```",
        "",
    ]
    if has_lora and not merged:
        lines += [
            f'`lora/` alone: `peft.PeftModel.from_pretrained(<{names["llm"]}>, "THIS_FOLDER/lora")`.',
            "",
        ]
    lines += ["## Frozen parts", "", "| part | name | sha256 of its tensors |", "|---|---|---|"]
    lines += [
        f"| {part} | {'llm/ (merged from ' + name + ')' if merged and part == 'llm' else name} | "
        f"`{frozen[part]}` |"
        for part, name in names.items()
    ]
    lines += [
        "",
        "## Training",
        "",
        f"Last stage: {description['stage']}"
        + (f", {description['step']} steps" if "step" in description else "")
        + ".",
    ]
    if corpora:
        lines += [
            "",
            f"Data of this stage: {hours:.2f} hours packed.",
            "",
            "| corpus | utterances | hours | tasks | languages |",
            "|---|---|---|---|---|",
        ]
        for c in corpora:
            shown = "not found" if c["hours"] is None else f"{c['hours']:.2f}"
            lines.append(
                f"| {c['name']} | {c['utterances']} | {shown} | {', '.join(c['tasks'])} | "
                f"{', '.join(c['languages'])} |"
            )
    if recipe:
        lines += [
            "",
            "<details><summary>Recipe</summary>",
            "",
            "```yaml",
            yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True).strip(),
            "```",
            "",
            "</details>",
        ]
    lines += ["", "## Scores", ""]
    if scores:
        lines += [
            "| predictions | task | utterances | scores (95 % interval) |",
            "|---|---|---|---|",
            *scores,
        ]
    else:
        lines.append(
            "None were found beside the model: run `python -m evaluation.run --model RUN --shards DIR --task "
            "all`."
        )
    return "\n".join(lines) + "\n"


def _short(name: str) -> str:
    return Path(name).name


def _corpus(corpus: dict) -> dict:
    """What a packed folder's index says of it, where it can be read from here."""
    folder = Path(corpus["shards"])
    try:
        known = read_object(folder / "index.json")
        shards, hours = [shard["nsamples"] for shard in known["shardlist"]], float(known["hours"])
        tasks, languages = map(str, known["tasks"]), [str(lang) for lang in known["langs"] if lang]
        return {
            "name": str(known["name"]),
            "hours": hours,
            "tasks": list(tasks),
            "utterances": sum(shards) or "",
            "languages": languages,
        }
    except (JsonError, LookupError, TypeError, ValueError):  # not here, or no packed folder
        return {"name": folder.name, "hours": None, "tasks": [], "utterances": "", "languages": []}


def _scores(run: Path) -> list[str]:
    """Rows of the table, from the scores that evaluation.run wrote beside the model."""
    rows = []
    for path in sorted((run / "evaluation").glob("*.scores.json")):
        try:
            rows += _rows(path)
        except (JsonError, LookupError, TypeError, ValueError, AttributeError) as error:
            raise SourceError(
                f"{path} does not hold scores of evaluation.run ({one_line(error)}): remove it"
            ) from None
    return rows


def _rows(path: Path) -> list[str]:
    rows = []
    for task, result in read_object(path)["tasks"].items():
        shown = []
        own = [name for name in result.get("columns", ()) if name not in _MAIN_SCORES]
        for name in (*_MAIN_SCORES, *own):
            if isinstance(result.get(name), (int, float)):
                bounds = result.get(f"{name}_ci95")
                shown.append(
                    f"{name} {result[name]:.3f}"
                    + (f" ({bounds[0]:.3f} to {bounds[1]:.3f})" if bounds else "")
                )
        rows.append(
            f"| {path.name.removesuffix('.scores.json')} | {task} | {result['utterances']} | "
            f"{', '.join(shown)} |"
        )
    return rows
