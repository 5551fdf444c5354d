"""Measure what the trained LLM keeps of its text ability: perplexity and answers before and after training.

    python -m evaluation.retention --model DIR [--passages FILE] [--questions FILE] [--out FILE]

Perplexity over passages (one a line), and greedy answers to short questions through the chat template: how
many are right, how many are the same. Before training is the LLM of its own folder: without LoRA, and without
the weights that `train.llm: all` has trained. The passages and questions that come with it (evaluation/text)
were written for this project; they are few and easy: they show damage, they do not rank models.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from sacrebleu.metrics import CHRF
from tqdm import tqdm

from core.command_line import CommandParser
from core.control_tokens import text_ids
from core.samples import asked
from evaluation.resampling import interval, paired_test
from model import artifact
from model.language_model import LLM, base_of
from model.official import stream_tensors
from model.pretrained import SourceError
from model.prompt import PromptError
from model.soundwave import Soundwave
from model.stages import STAGES

TEXT = Path(__file__).parent / "text"
LONGEST = 2048  # tokens of one passage; what is longer is cut


@torch.inference_mode()
def negative_log_likelihood(model: Soundwave, passage: str) -> tuple[float, int]:
    """Sum over the passage's tokens of -log p(token | those before), and how many were predicted."""
    llm: Any = model.llm  # callable, whichever class it is
    device = next(llm.parameters()).device
    ids = torch.tensor([text_ids(model.tokenizer, passage, add_special_tokens=True)[:LONGEST]], device=device)
    if ids.shape[1] < 2:
        return 0.0, 0
    logits = llm(input_ids=ids).logits[0, :-1].float()
    return float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")), ids.shape[1] - 1


def answer(model: Soundwave, question: str, max_new_tokens: int) -> str:
    """The greedy answer to a text question."""
    return model.answer([[asked(question, audios=0)]], max_new_tokens=max_new_tokens)[0].strip()


def is_right(given: str, accepted: list[str]) -> bool:
    """Return whether an accepted word is in the answer's first sentence, as a whole word."""
    first = re.split(r"(?<=[.!?])\s|\n", given.strip().lower(), maxsplit=1)[0]
    return any(re.search(rf"(?<!\w){re.escape(word.lower())}(?!\w)", first) for word in accepted)


def own_weights(model: Soundwave) -> dict[str, torch.Tensor]:
    """Return the tensors of the LLM's own folder in whose place the model has trained ones (train.llm: all),
    by their names in the LLM. Errors: SourceError."""
    trained = {name.removeprefix("llm.") for name in model.tuned if name.startswith("llm.")}
    if not trained:
        return {}
    files = model.sources["llm"].files
    found = {n: tensor for n, tensor in stream_tensors(files, "reading the base") if n in trained}
    if missing := sorted(trained - found.keys()):
        raise SourceError(
            f"the files of {files} name the trained '{missing[0]}' otherwise: save the base model anew with "
            "transformers' save_pretrained"
        )
    return found


@contextmanager
def untrained(model: Soundwave, own: dict[str, torch.Tensor]) -> Iterator[None]:
    """Within it the LLM is that of its own folder: without LoRA, and with the weights of `own_weights`."""
    llm: Any = model.llm
    parameters = {
        name.replace(".base_layer.", "."): parameter for name, parameter in base_of(llm).named_parameters()
    }

    def exchange() -> None:
        for name, value in own.items():
            parameter = parameters[name]
            own[name], parameter.data = parameter.data, value.to(parameter.device, parameter.dtype)

    with llm.disable_adapter() if isinstance(llm, PeftModel) else nullcontext():
        exchange()
        try:
            yield
        finally:
            exchange()


def check_trained(model: Soundwave) -> LLM:
    """Return the trained LLM. Errors: ValueError for an LLM that was not trained."""
    if model.llm is None:
        raise ValueError("the model has no LLM (stage 1): give one of stage 2 or 3")
    if not isinstance(model.llm, PeftModel) and not any(name.startswith("llm.") for name in model.tuned):
        raise ValueError(
            "the model was trained without LoRA (model.llm.lora_r = 0) and without train.llm: all: there is "
            "nothing to compare"
        )
    return model.llm


def retention(model: Soundwave, passages: list[str], questions: list[dict], max_new_tokens: int = 48) -> dict:
    """Both sides on all texts: {perplexity, questions, answers}. Errors: ValueError for an LLM that was not
    trained."""
    llm = check_trained(model)
    own = own_weights(model)
    rows, scored = [], []
    for passage in tqdm(passages, desc="passages", unit="passage"):
        tuned, tokens = negative_log_likelihood(model, passage)
        with untrained(model, own):
            base, _ = negative_log_likelihood(model, passage)
        scored.append((base, tuned, tokens))
    for item in tqdm(questions, desc="questions", unit="question"):
        theirs = answer(model, item["question"], max_new_tokens)
        with untrained(model, own):
            before = answer(model, item["question"], max_new_tokens)
        rows.append(
            {
                "question": item["question"],
                "base": before,
                "tuned": theirs,
                "base_right": is_right(before, item["accept"]),
                "tuned_right": is_right(theirs, item["accept"]),
            }
        )
    result: dict = {"base": str(base_of(llm).config.name_or_path)}
    if scored:
        bases, tunes, counts = (np.array(column, dtype=np.float64) for column in zip(*scored, strict=True))
        low, high = interval(tunes - bases, counts)
        result["perplexity"] = {
            "passages": len(scored),
            "tokens": int(counts.sum()),
            "base": math.exp(bases.sum() / counts.sum()),
            "tuned": math.exp(tunes.sum() / counts.sum()),
            "ratio": math.exp((tunes - bases).sum() / counts.sum()),
            "ratio_ci95": [math.exp(low), math.exp(high)],
        }
    if rows:
        test = paired_test(
            [row["base_right"] for row in rows], [row["tuned_right"] for row in rows], np.ones(len(rows))
        )
        result["questions"] = {
            "questions": len(rows),
            "base_right": test["first"],
            "tuned_right": test["second"],
            "difference_ci95": test["difference_ci95"],
            "p_value": test["p_value"],
            "same_answer": float(np.mean([row["base"] == row["tuned"] for row in rows])),
            "chrf_to_base": CHRF()
            .corpus_score([r["tuned"] for r in rows], [[r["base"] for r in rows]])
            .score,
        }
    return result | {"answers": rows}


def table(result: dict) -> str:
    """Return the report as a Markdown table, one row a measure."""
    lines = ["| | before training | after | after against before, 95 % interval |", "|---|---|---|---|"]
    if part := result.get("perplexity"):
        low, high = part["ratio_ci95"]
        lines.append(
            f"| perplexity, {part['tokens']} tokens | {part['base']:.2f} | {part['tuned']:.2f} "
            f"| ratio {part['ratio']:.3f} [{low:.3f}, {high:.3f}] |"
        )
    if part := result.get("questions"):
        low, high = (100 * bound for bound in part["difference_ci95"])
        lines.append(
            f"| right answers, {part['questions']} questions | {part['base_right']:.1%} "
            f"| {part['tuned_right']:.1%} | difference [{low:+.1f}, {high:+.1f}] points, "
            f"p = {part['p_value']:.3g} |"
        )
        lines.append(f"| the same answers | | {part['same_answer']:.1%} | chrF {part['chrf_to_base']:.1f} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = CommandParser(
        "python -m evaluation.retention",
        __doc__.splitlines()[0],
        example="--model runs/me/sft/model --out retention.json",
    )
    parser.add_argument("--model", type=Path, required=True, help="model folder of stage 2 or 3")
    parser.add_argument(
        "--passages", type=Path, default=TEXT / "passages.txt", help="text file, one passage a line"
    )
    parser.add_argument(
        "--questions",
        type=Path,
        default=TEXT / "questions.jsonl",
        help='JSON lines {"question": text, "accept": [words]}',
    )
    parser.add_argument("--max-new-tokens", type=int, default=48, help="longest answer")
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument(
        "--out", type=Path, help="result as JSON (default: <model>/evaluation/retention.json)"
    )
    options = parser.parse_args(arguments)
    try:
        for file in (options.passages, options.questions):
            if not file.exists():
                raise ValueError(f"{file} does not exist")
        passages = [
            line for line in options.passages.read_text(encoding="utf-8").splitlines() if line.strip()
        ]
        questions = [
            json.loads(line)
            for line in options.questions.read_text(encoding="utf-8").splitlines()
            if line.strip()
        ]
        if not STAGES[artifact.describe(options.model)["stage"]].needs_llm:
            raise ValueError(
                f"{options.model} is of stage 1, which leaves the LLM alone: give a folder of stage 2 or 3"
            )
        model = artifact.load(
            options.model, device=options.device or ("cuda" if torch.cuda.is_available() else "cpu")
        )
        result = retention(model, passages, questions, options.max_new_tokens)
    except (ValueError, SourceError, PromptError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    out = options.out or options.model / "evaluation" / "retention.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    print(table(result))
    print(f"result: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
