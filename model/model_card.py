"""The README.md of an exported model: filled in from its folder, its recipe, the packed data and its
scores."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import yaml
from huggingface_hub import EvalResult, ModelCardData

from core.console import one_line
from core.json_files import JsonError, read_object
from model.pretrained import SourceError

_SHARES = ("wer", "cer", "accuracy", "exact")  # in percent in the hub's metadata
_HUB_METRICS = {"exact": "exact_match"}  # the hub's name of a metric, where it is another
_HUB_TASKS = {"asr": "automatic-speech-recognition", "translation": "translation"}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_USE = [
    "```python",
    "import model.auto",
    "from transformers import AutoModel",
    "",
    'speech_llm = AutoModel.from_pretrained("THIS_FOLDER")',
    'chat = [{"role": "user", "content": "<audio_patch>\\nPlease transcribe the following audio."}]',
    "print(speech_llm.answer([chat], [waveform]))  # waveform: [samples] at 16 kHz",
    "```",
]
_HUB_USE = [
    "```python",
    "from transformers import AutoModel, AutoProcessor",
    "",
    'model = AutoModel.from_pretrained("THIS_MODEL", trust_remote_code=True)',
    'processor = AutoProcessor.from_pretrained("THIS_MODEL", trust_remote_code=True)',
    "chat = [",
    '    {"role": "user", "content": [',
    '        {"type": "audio", "audio": "clip.wav"},',
    '        {"type": "text", "text": "Please transcribe the following audio."},',
    "    ]}",
    "]",
    "inputs = processor.apply_chat_template(chat).to(model.device)",
    "print(processor.batch_decode(model.generate(**inputs, max_new_tokens=200))[0])",
    "```",
    "",
    "Needs torch, transformers and soundfile; audio at another rate than 16 kHz: soxr as well.",
]
_MAIN_SCORES = ("wer", "cer", "bleu", "chrf", "accuracy", "exact")


def model_card(
    run: Path,
    description: dict,
    names: dict[str, str],
    frozen: dict[str, str],
    *,
    merged: bool,
    has_lora: bool,
    hub_layout: bool = False,
) -> str:
    """run: the model folder; description: its soundwave.json; names: of the frozen parts; frozen: their
    sha256."""
    recipe = description.get("recipe") or {}
    corpora = [_corpus(c) for c in recipe.get("data", {}).get("train", [])]
    languages = sorted({lang for c in corpora for lang in c["languages"]})
    scores = _scores(run)
    title = f"Soundwave: {_short(names['encoder'])} + {_short(names['llm'])}"
    # The hub's own ids alone: a folder of this machine is no base model that the hub knows.
    bases = [
        one for one in (names["llm"], names["encoder"]) if _HUB_ID.fullmatch(one) and not Path(one).exists()
    ]
    results = [result for score in scores for result in score.results]
    header = ModelCardData(
        library_name="transformers",
        pipeline_tag="audio-text-to-text",
        tags=["speech", "audio", "soundwave"],
        base_model=bases or None,
        language=languages or None,
        model_name=title if results else None,
        eval_results=results or None,
    )
    hours = sum(c["hours"] for c in corpora if c["hours"] is not None)
    lines = [
        "---",
        header.to_yaml().strip(),
        "---",
        "",
        f"# {title}",
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
        *(_HUB_USE if hub_layout else _USE),
        "",
    ]
    if has_lora and not merged:
        lines += [
            f'`lora/` alone: `peft.PeftModel.from_pretrained(<{names["llm"]}>, "THIS_FOLDER/lora")`.',
            "",
        ]
    lines += ["## Frozen parts", "", "| part | name | sha256 of its tensors |", "|---|---|---|"]
    lines += [
        f"| {part} | {_part(part, name, merged, hub_layout)} | `{frozen[part]}` |"
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
            *(score.row for score in scores),
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
        index = read_object(folder / "index.json")
        shards, hours = [shard["nsamples"] for shard in index["shardlist"]], float(index["hours"])
        tasks, languages = map(str, index["tasks"]), [str(lang) for lang in index["langs"] if lang]
        return {
            "name": str(index["name"]),
            "hours": hours,
            "tasks": list(tasks),
            "utterances": sum(shards) or "",
            "languages": languages,
        }
    except (JsonError, LookupError, TypeError, ValueError):  # not here, or no packed folder
        return {"name": folder.name, "hours": None, "tasks": [], "utterances": "", "languages": []}


def _part(part: str, name: str, merged: bool, hub_layout: bool) -> str:
    if not merged or part != "llm":
        return name
    return f"{name}, LoRA merged" if hub_layout else f"llm/ (merged from {name})"


class _Score(NamedTuple):
    row: str  # of the card's table
    results: list[EvalResult]  # for the hub's metadata


def _scores(run: Path) -> list[_Score]:
    """What evaluation.run wrote beside the model. Errors: SourceError."""
    scores = []
    for path in sorted((run / "evaluation").glob("*.scores.json")):
        try:
            scores += _read_scores(path)
        except (JsonError, LookupError, TypeError, ValueError, AttributeError) as error:
            raise SourceError(
                f"{path} does not hold scores of evaluation.run ({one_line(error)}): remove it"
            ) from None
    return scores


def _read_scores(path: Path) -> list[_Score]:
    scores, data = [], path.name.removesuffix(".scores.json")
    for task, result in read_object(path)["tasks"].items():
        shown, results = [], []
        own = [name for name in result.get("columns", ()) if name not in _MAIN_SCORES]
        for name in (*_MAIN_SCORES, *own):
            if not isinstance(value := result.get(name), (int, float)):
                continue
            bounds = result.get(f"{name}_ci95")
            shown.append(f"{name} {value:.3f}" + (f" ({bounds[0]:.3f} to {bounds[1]:.3f})" if bounds else ""))
            percent = 100 * value if name in _SHARES else value
            results.append(
                EvalResult(
                    task_type=_HUB_TASKS.get(task, "audio-text-to-text"),
                    task_name=task,
                    dataset_type=data,
                    dataset_name=data,
                    dataset_config=task,  # tasks of one set are results of their own
                    metric_type=_HUB_METRICS.get(name, name),
                    metric_name=name + (f" (95% {_interval(name, bounds)})" if bounds else ""),
                    metric_value=round(percent, 2),
                )
            )
        row = f"| {data} | {task} | {result['utterances']} | {', '.join(shown)} |"
        scores.append(_Score(row, results))
    return scores


def _interval(name: str, bounds: list[float]) -> str:
    factor = 100 if name in _SHARES else 1
    return f"{factor * bounds[0]:.1f} to {factor * bounds[1]:.1f}"
