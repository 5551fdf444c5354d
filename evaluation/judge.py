"""Rate free answers with a language model as judge; it gets text only.

    python -m evaluation.judge P.jsonl --endpoint http://localhost:8000/v1 --judge-model NAME
    python -m evaluation.judge P.jsonl --local FOLDER

Each answer is rated from 1 to 10 against the reference answer, given a description of the audio (AIR-Bench's
`meta_info` with --meta, else the transcript), twice with the two answers in either order; the mean of both
counts. Judgements are kept in P.judge.jsonl, so an interrupted run resumes, and the score is recomputed from
those of this judge, wording and answer. The wording is this project's (replace it with --template): scores by
another wording or another judge are not comparable.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from core.command_line import CommandParser
from core.console import one_line, print_error, print_text
from core.samples import PromptError
from evaluation.air_bench import read_meta, sample_id
from evaluation.endpoint import AddressError, Endpoint, EndpointError, sent_in_clear
from evaluation.predictions import PredictionError, end_last_line, read_predictions, read_rows, row_key
from evaluation.resampling import interval

TEMPLATE = """You grade two answers to a question about an audio recording. You cannot hear it; this is what is in it:
<audio>
{description}
</audio>
Question: {question}
<answer 1>
{first}
</answer 1>
<answer 2>
{second}
</answer 2>
Rate each answer from 1 (useless or wrong) to 10 (correct, relevant and complete). Reply with the two numbers alone, that of \
answer 1 first, separated by a space."""
_TAGS = re.compile(r"<(?=/?(?:audio|answer)\b)")


def local_judge(folder: Path) -> Callable[[str], str]:
    """A function text -> reply of a transformers model folder, on the GPU where there is one. Errors:
    PredictionError."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from model.pretrained import SourceError, reading
    from model.prompt import chat_ids

    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        with reading(folder, "chat model"):
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", trust_remote_code=False)
            model.to(torch.device(device)).eval()
    except SourceError as error:
        raise PredictionError(str(error)) from None

    def get_reply(text: str) -> str:
        # As text: an answer that holds the judge's control tokens must not open a turn of its own.
        ids = torch.tensor(
            [chat_ids(tokenizer, [{"role": "user", "content": text, "audios": 0}])[0]], device=model.device
        )
        with torch.inference_mode():
            output = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=32, do_sample=False
            )
        return str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))

    return get_reply


def parse_scores(reply: str) -> tuple[float, float] | None:
    """The two ratings of a reply: a line of two numbers from 1 to 10 and nothing else ("7 9", "7/10, 9/10");
    None without one."""
    number = r"(\d+(?:\.\d+)?)(?:\s*/\s*10)?"
    match = re.search(rf"^\s*{number}[\s,;]+{number}\s*$", reply, re.MULTILINE)
    numbers = [float(n) for n in match.groups()] if match else []
    return (numbers[0], numbers[1]) if numbers and all(1 <= n <= 10 for n in numbers) else None


def digest_of(row: dict, description: str, judge: str, template: str = TEMPLATE) -> str:
    """sha256 over all that a judgement depends on: one of another judge, wording, answer or reference has
    another digest."""
    parts = [
        row_key(row),
        judge,
        template,
        row.get("prompt"),
        row["prediction"],
        row["reference"],
        description,
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _plain(text: str) -> str:
    """An answer must not end its own part of the template and add instructions to the judge."""
    return _TAGS.sub("&lt;", text)


def read_template(path: Path | None) -> str:
    """Errors: PredictionError for a file that cannot be read or filled in."""
    try:
        template = path.read_text() if path else TEMPLATE
        template.format(description="", question="", first="", second="")
    except (OSError, ValueError, LookupError, AttributeError) as error:
        raise PredictionError(
            f"--template {path} cannot be used ({one_line(error)}): it may hold "
            "{description} {question} {first} {second}, and {{ for a brace"
        ) from None
    return template


def judge_row(row: dict, description: str, get_reply: Callable[[str], str], template: str = TEMPLATE) -> dict:
    """Both orders of one answer and its reference: {id, corpus, task, score, reference_score, replies}; score
    None: unread."""
    values = {"description": _plain(description), "question": _plain(row.get("prompt") or "What is said?")}
    answer, reference = _plain(row["prediction"]), _plain(row["reference"])
    replies = [
        get_reply(template.format(**values, first=reference, second=answer)),
        get_reply(template.format(**values, first=answer, second=reference)),
    ]
    pairs = [parse_scores(reply) for reply in replies]
    ratings = [
        (pair[1 - swapped], pair[swapped]) for swapped, pair in enumerate(pairs) if pair
    ]  # (answer, reference)
    means: list[float] | None = np.mean(ratings, axis=0).tolist() if ratings else None
    score, other = means or (None, None)
    return {
        "id": row["id"],
        "corpus": row.get("corpus"),
        "task": row.get("task"),
        "score": score,
        "reference_score": other,
        "replies": replies,
    }


def summarise(judgements: list[dict]) -> dict:
    """{task: {judged, unread, score, score_ci95, reference_score, wins}}: wins is the share rated above the
    reference."""
    result: dict[str, dict[str, Any]] = {}
    for task in sorted({j.get("task") or "" for j in judgements}):
        rows = [j for j in judgements if (j.get("task") or "") == task]
        read = [j for j in rows if j["score"] is not None]
        result[task] = {"judged": len(read), "unread": len(rows) - len(read)}
        if read:
            scores = [j["score"] for j in read]
            result[task] |= {
                "score": float(np.mean(scores)),
                "score_ci95": interval(scores, np.ones(len(scores))),
                "reference_score": float(np.mean([j["reference_score"] for j in read])),
                "wins": float(np.mean([j["score"] > j["reference_score"] for j in read])),
            }
    return result


def main(arguments: list[str] | None = None) -> int:
    parser = CommandParser(
        "python -m evaluation.judge",
        __doc__.splitlines()[0],
        example="predictions.jsonl --endpoint http://localhost:8000/v1 --judge NAME",
    )
    parser.add_argument("predictions", type=Path, help="predictions file of evaluation.run")
    judge = parser.add_mutually_exclusive_group(required=True)
    judge.add_argument(
        "--endpoint", help="base URL of an OpenAI-compatible server, e.g. http://localhost:8000/v1"
    )
    judge.add_argument("--local", type=Path, help="folder of a transformers chat model")
    parser.add_argument("--judge-model", default="default", help="model name for the endpoint")
    parser.add_argument(
        "--key-env", default="OPENAI_API_KEY", help="environment variable that holds the endpoint's key"
    )
    parser.add_argument(
        "--meta", type=Path, help="AIR-Bench's Chat_meta.json, for its descriptions of the audio"
    )
    parser.add_argument("--template", type=Path, help="text with {description} {question} {first} {second}")
    options = parser.parse_args(arguments)
    try:
        endpoint = None
        if options.endpoint:  # first: an address with a password in it must not be stored as the judge's name
            key = os.environ.get(options.key_env)
            endpoint = Endpoint(options.endpoint, options.judge_model, key, key_source=options.key_env)
            if key and sent_in_clear(options.endpoint):
                print_error(f"warning: the key in {options.key_env} goes unencrypted to {options.endpoint}")
        rows, notes = read_predictions(options.predictions)
        described = (
            {sample_id(item): item.get("meta_info") for item in read_meta(options.meta)}
            if options.meta
            else {}
        )
        template = read_template(options.template)
        judge_name = str(options.local or f"{options.endpoint} {options.judge_model}")
        requested = {}
        for row in rows:
            description = described.get(row["id"]) or row.get("transcript") or row["reference"]
            requested[digest_of(row, description, judge_name, template)] = row, description
        judgements_path = options.predictions.with_suffix(".judge.jsonl")
        end_last_line(judgements_path)
        before = read_rows(judgements_path) if judgements_path.exists() else []
        judged = {
            judgement["digest"]: judgement for judgement in before if judgement.get("digest") in requested
        }
        if options.local and not (options.local / "config.json").exists():
            raise PredictionError(f"{options.local} is no model folder (it holds no config.json)")
        get_reply: Any = (
            local_judge(options.local) if options.local else endpoint
        )  # an endpoint is None only then
        with judgements_path.open("a", encoding="utf-8") as out:
            for digest in tqdm(
                [digest for digest in requested if digest not in judged], desc="judging", unit="answer"
            ):
                judged[digest] = judge_row(*requested[digest], get_reply, template) | {"digest": digest}
                out.write(json.dumps(judged[digest], ensure_ascii=False) + "\n")
                out.flush()
    except (PredictionError, EndpointError, PromptError) as error:
        print_error("error:", error)
        return 2 if isinstance(error, (PredictionError, AddressError, PromptError)) else 1
    for note in notes:
        print_text(f"note: {note}")
    others = sum(judgement.get("digest") not in requested for judgement in before)
    if others:
        print(
            f"{others} judgements in {judgements_path} are of another judge, wording or answer: not counted"
        )
    tasks = summarise(list(judged.values()))
    summary = {"judge": judge_name, "tasks": tasks}
    options.predictions.with_suffix(".judge.json").write_text(json.dumps(summary, indent=1) + "\n")
    for task, part in tasks.items():
        low, high = part.get("score_ci95", (0, 0))
        shown = f"{part['score']:.2f} [{low:.2f}, {high:.2f}]" if part["judged"] else "no score"
        print_text(f"{task}: {shown} of 10 ({part['judged']} judged, {part['unread']} replies unread)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
