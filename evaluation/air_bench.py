"""Convert AIR-Bench to a manifest, and predictions to its result files.

    python -m evaluation.air_bench manifest --meta AIR-Bench/Foundation/Foundation_meta.json --out
    foundation.jsonl python data_tools/pack.py --manifest foundation.jsonl --out shards/air-bench-foundation
    python -m evaluation.run --model DIR --shards shards/air-bench-foundation --task all
    python -m evaluation.air_bench results --meta ... --predictions P.jsonl --out
    Foundation_result_soundwave.jsonl

Foundation questions are lettered choices (accuracy by evaluation.score, one task a line); chat answers are
judged (evaluation.judge). Layout: github.com/OFA-Sys/AIR-Bench; audio lies in
<task_name>_<dataset_name>/<path> beside the JSON, that of Audio_Grounding as .flac.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from core.command_line import CommandParser
from core.console import one_line
from evaluation.predictions import PredictionError, read_predictions

LETTERS = "ABCD"
INSTRUCTION = "Listen to the audio and answer the question with the letter of the best option."


def sample_id(item: dict) -> str:
    return f"{item['task_name']}_{item['dataset_name']}-{item['uniq_id']}"


def audio_path(item: dict, root: Path) -> Path:
    path = root / f"{item['task_name']}_{item['dataset_name']}" / item["path"]
    return path.with_suffix(".flac") if item["task_name"] == "Audio_Grounding" else path


def manifest_line(item: dict, root: Path, instruction: str = INSTRUCTION) -> dict:
    """One line for data_tools/pack.py. Foundation items carry `choice_a` to `choice_d` (the last two may be
    missing)."""
    line = {
        "id": sample_id(item),
        "audio": str(audio_path(item, root)),
        "text": None,
        "task": item["task_name"],
        "lang": "en",
        "origin": f"AIR-Bench {item['dataset_name']}",
    }
    options = [item.get(f"choice_{letter.lower()}") for letter in LETTERS]
    options = [_one_line(option) for option in options if option is not None]
    if not options:
        return line | {"prompt": item["question"], "response": item["answer_gt"]}
    label = _one_line(item["answer_gt"])
    if label not in options:
        raise ValueError(f"{sample_id(item)}: answer_gt '{label}' is none of its choices")
    lettered = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))
    return line | {
        "prompt": f"{instruction}\n{item['question']}\n{lettered}",
        "response": label,
        "label": label,
    }


def write_manifest(meta: Path, out: Path, root: Path | None, instruction: str) -> tuple[int, list[str]]:
    """Lines written, and what was left out (one phrase each: missing audio, a question whose answer is no
    choice)."""
    root, lines, left_out = (root or meta.parent).resolve(), [], []
    for item in read_meta(meta):
        try:
            line = manifest_line(item, root, instruction)
        except ValueError as error:
            left_out.append(str(error))
            continue
        if Path(line["audio"]).exists():
            lines.append(json.dumps(line, ensure_ascii=False))
        else:
            left_out.append(f"{line['id']}: no audio {line['audio']}")
    out.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return len(lines), left_out


def write_results(meta: Path, predictions: Path, out: Path) -> tuple[int, int]:
    """The items with `response` added, as the benchmark's own scorers read them; returns answered and
    unanswered counts."""
    answers = {row["id"]: row["prediction"] for row in read_predictions(predictions)[0]}
    items = read_meta(meta)
    answered = [item | {"response": answers[sample_id(item)]} for item in items if sample_id(item) in answers]
    out.write_text(
        "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in answered), encoding="utf-8"
    )
    return len(answered), len(items) - len(answered)


def read_meta(meta: Path) -> list[dict]:
    if not meta.exists():
        raise PredictionError(
            f"{meta} does not exist: give Foundation_meta.json or Chat_meta.json of a local copy of AIR-Bench"
        )
    try:
        items = json.loads(meta.read_text(encoding="utf-8"))
        for item in items:
            sample_id(item), item["path"], item["question"], item["answer_gt"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise PredictionError(
            f"{meta} is not in AIR-Bench's layout ({one_line(error)}): a list of objects with "
            "path, question, answer_gt, task_name, dataset_name and uniq_id"
        ) from None
    return items


def _one_line(text: object) -> str:
    return " ".join(str(text).split())


def main(arguments: list[str] | None = None) -> int:
    parser = CommandParser(
        "python -m evaluation.air_bench",
        __doc__.splitlines()[0],
        example="manifest --meta Foundation_meta.json --out foundation.jsonl",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    first = commands.add_parser("manifest", help="published JSON -> manifest for data_tools/pack.py")
    first.add_argument("--root", type=Path, help="folder of the audio folders (default: where the JSON is)")
    first.add_argument("--instruction", default=INSTRUCTION, help="the sentence before a foundation question")
    second = commands.add_parser("results", help="predictions -> published result layout")
    second.add_argument("--predictions", type=Path, required=True, help="predictions file of evaluation.run")
    for command in (first, second):
        command.add_argument(
            "--meta", type=Path, required=True, help="Foundation_meta.json or Chat_meta.json"
        )
        command.add_argument("--out", type=Path, required=True, help="file to write")
    options = parser.parse_args(arguments)
    try:
        if options.command == "manifest":
            written, left_out = write_manifest(options.meta, options.out, options.root, options.instruction)
            for reason in left_out[:20]:
                print(f"warning: left out: {reason}", file=sys.stderr)
            print(f"{options.out}: {written} questions, {len(left_out)} left out")
            return 0 if written else 2
        answered, unanswered = write_results(options.meta, options.predictions, options.out)
        print(f"{options.out}: {answered} answers, {unanswered} questions without one")
        return 0
    except PredictionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
