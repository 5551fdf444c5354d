"""Compare vLLM's greedy tokens with torch's, clip by clip.

    python -m benchmarks.vllm_equal --model MODEL --shards .cache/quickstart/shards/dialogues-test

Both get the same prompts: vLLM as embeddings, from the model that encodes for it. An answer that differs is
followed to its first differing token: torch's two best logits there, and how far apart they are. A distance
of at most --tie is rounding; anything else ends the command with code 1.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch

from benchmarks.machine import keep, machine
from core.command_line import CommandParser
from model import artifact
from model.batch import Batch
from model.language_model import base_of, end_ids
from model.soundwave import Soundwave
from recipe.config import DataConfig
from soundwave.vllm import Sampling, start
from stream import EvalStream

TIE = 1e-4


def best_two(model: Soundwave, prompt: torch.Tensor, tokens: list[int]) -> tuple[list[int], float]:
    """The two best next tokens after a prompt [L, D] and tokens, and the difference of their logits."""
    embed = base_of(model.llm).get_input_embeddings()
    embedded = embed(torch.tensor(tokens, dtype=torch.long)).to(prompt.dtype)
    logits = model.llm(inputs_embeds=torch.cat([prompt, embedded])[None]).logits[0, -1].float()
    best = logits.topk(2)
    return best.indices.tolist(), float(best.values[0] - best.values[1])


def difference(model: Soundwave, batch: Batch, place: int, ours: list[int], theirs: list[int]) -> dict:
    """What torch finds at the first token that differs between two answers."""
    prompt = model.prompt_embeddings(batch, model.encode_audio(batch))[place]
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
    at = min(len(ours), len(theirs)) if at is None else at
    best, apart = best_two(model, prompt, ours[:at])
    return {"at": at, "torch": ours, "vllm": theirs, "best": best, "apart": apart}


@torch.inference_mode()
def main() -> int:
    parser = CommandParser(
        "python -m benchmarks.vllm_equal",
        __doc__,
        example="--model runs/quickstart/sft/model --shards .cache/quickstart/shards/dialogues-test",
    )
    parser.add_argument("--model", type=Path, required=True, help="model folder of stage 2 or 3")
    parser.add_argument("--shards", required=True, help="folder written by data_tools/pack.py")
    parser.add_argument("--limit", type=int, help="only this many clips, evenly spaced")
    parser.add_argument("--max-new-tokens", type=int, default=200, help="the longest answer")
    parser.add_argument("--rows", type=int, default=16, help="that vLLM answers at a time (default: 16)")
    parser.add_argument("--tie", type=float, default=TIE, help=f"logits (default: {TIE:g})")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("benchmarks/results/vllm_equal.json"),
        help="where to write the numbers (default: %(default)s)",
    )
    options = parser.parse_args()
    facts = machine("cpu")
    model, front = (artifact.load(options.model, dtype="float32", device="cpu").eval() for _ in range(2))
    vllm = start(front, options.model, rows=options.rows)
    stop = end_ids(model.tokenizer, model.config.prompt, base_of(model.llm).generation_config)
    stream = EvalStream(
        options.shards,
        model.tokenizer,
        model.config,
        model.stage,
        tasks=["asr"],
        limit=options.limit,
        data=DataConfig(workers=0),
    )
    clips = tokens = longest = 0
    seconds = {"torch": 0.0, "vllm": 0.0}
    differences = []
    for batch, samples in stream:
        began = time.perf_counter()
        prompts = front.prompt_embeddings(batch, front.encode_audio(batch))
        pending = [
            vllm.answer(one, max_tokens=options.max_new_tokens, sampling=Sampling(), stop=stop)
            for one in prompts
        ]
        theirs = [answer.result() for answer in pending]
        seconds["vllm"] += time.perf_counter() - began
        began = time.perf_counter()
        ours = model.generate(batch, max_new_tokens=options.max_new_tokens)
        seconds["torch"] += time.perf_counter() - began
        for place, sample in enumerate(samples):
            clips, tokens = clips + 1, tokens + len(ours[place])
            longest = max(longest, len(ours[place]))
            if ours[place] != theirs[place]:
                more = difference(model, batch, place, ours[place], theirs[place])
                differences.append({"id": sample["id"], **more, "is_tie": more["apart"] <= options.tie})
                print(differences[-1], flush=True)
        print(f"{clips - len(differences)} of {clips} equal", file=sys.stderr, flush=True)
    vllm.close()
    wrong = [one for one in differences if not one["is_tie"]]
    equal, ties = clips - len(differences), len(differences) - len(wrong)
    table = (
        f"{clips} clips, {tokens} tokens, at most {longest} in an answer, fp32: {equal} equal, "
        f"{ties} part where torch's two best logits are at most {options.tie:g} apart, "
        f"{len(wrong)} differ otherwise\n"
        f"seconds: torch {seconds['torch']:.0f}, vLLM {seconds['vllm']:.0f} (encoder included)"
    )
    print(table)
    counts = {"clips": clips, "tokens": tokens, "longest": longest, "equal": equal}
    keep(options.out, {"machine": facts, **counts, "seconds": seconds, "different": differences}, table)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
