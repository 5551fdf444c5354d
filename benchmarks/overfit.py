"""Fit a model to a few clips: a model for benchmarks whose CTC head is right on nearly all their words.

    python -m benchmarks.overfit --model RUN/sft/model --shards DIR --clips 100 --ctc-text raw --out DIR/model

First the alignment adapter and the CTC head are trained with the CTC loss alone (the LLM takes no part), then
both adapters and LoRA with cross-entropy and CTC. There is no dropout. The clips are spread evenly over the
corpus; `benchmarks.generate --shards DIR --clips N` selects the same ones for the same N.
"""

from __future__ import annotations

import jiwer
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from benchmarks.generate import clips
from core.command_line import CommandParser
from core.ctc_text import NORMALISATIONS, ctc_target_ids, normalise
from core.samples import INSTRUCTIONS, asked
from model import artifact
from model.batch import Batch
from model.prompt import chat_ids
from model.soundwave import Soundwave


def samples(model: Soundwave, shards: str, count: int, ctc_text: str) -> list[dict[str, torch.Tensor]]:
    """Encoder features [T, E], CTC targets [U], input ids [L] and labels [L] of each clip."""
    rows = []
    for clip in tqdm(clips(shards, count), desc="encode"):
        with torch.no_grad():
            features, frames = model.encoder(
                clip.samples[None], torch.tensor([len(clip.samples)]), False, None
            )
        chat = [
            asked(INSTRUCTIONS["asr"], model.config.audio_token),
            {"role": "assistant", "content": clip.text},
        ]
        ids, labels = chat_ids(
            model.tokenizer, chat, model.config.prompt, model.config.audio_token, model.config.system_prompt
        )
        rows.append(
            {
                "features": features[0, : int(frames)],
                "targets": torch.tensor(ctc_target_ids(model.tokenizer, clip.text, ctc_text)),
                "ids": torch.tensor(ids),
                "labels": torch.tensor(labels),
            }
        )
    return rows


def batch_of(chosen: list[dict[str, torch.Tensor]]) -> Batch:
    def padded(key: str, value: float = 0) -> torch.Tensor:
        return pad_sequence([one[key] for one in chosen], batch_first=True, padding_value=value)

    def lengths(key: str) -> torch.Tensor:
        return torch.tensor([len(one[key]) for one in chosen])

    ids = padded("ids")
    return Batch(
        waveforms=None,
        features=padded("features"),
        audio_lengths=lengths("features"),
        audio_is_dummy=False,
        ctc_targets=padded("targets"),
        ctc_target_lengths=lengths("targets"),
        has_transcript=torch.ones(len(chosen), dtype=torch.bool),
        input_ids=ids,
        attention_mask=(torch.arange(ids.shape[1]) < lengths("ids")[:, None]).long(),
        labels=padded("labels", -100),
    )


def fit(
    model: Soundwave, data: list[dict], steps: int, size: int, losses: tuple[str, ...], rate: float
) -> None:
    """Run `steps` steps of AdamW with a rate that falls to 0; batches of `size` clips."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    order: list[int] = []
    progress = tqdm(range(steps), desc=" + ".join(losses))
    for _ in progress:
        if len(order) < size:
            order = torch.randperm(len(data)).tolist()
        batch = batch_of([data[order.pop()] for _ in range(min(size, len(order)))])
        output = model(batch, losses=losses)
        loss = output.ctc_sum / len(batch.input_ids)
        if "ce" in losses:
            loss = loss + output.ce_sum / (batch.labels != -100).sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.3f}")


@torch.no_grad()
def ctc_word_error_rate(model: Soundwave, data: list[dict]) -> float:
    references, hypotheses = [], []
    for start in range(0, len(data), 16):
        batch = batch_of(data[start : start + 16])
        for one, text in zip(data[start : start + 16], model.ctc_greedy(batch), strict=True):
            references.append(normalise(model.tokenizer.decode(one["targets"]), "lower_no_punctuation"))
            hypotheses.append(normalise(text, "lower_no_punctuation"))
    return jiwer.wer(references, hypotheses)


def main() -> None:
    parser = CommandParser(
        "python -m benchmarks.overfit",
        __doc__,
        example="--model runs/quickstart/shrinking/model --shards shards/test --out overfit",
    )
    parser.add_argument("--model", required=True, help="model folder of stage 2 or 3 to start from")
    parser.add_argument("--shards", required=True, help="folder written by data_tools/pack.py")
    parser.add_argument("--out", required=True, help="folder for the fitted model")
    parser.add_argument("--clips", type=int, default=100, help="clips that the model is fitted to")
    parser.add_argument(
        "--ctc-text",
        choices=NORMALISATIONS,
        default="lower_no_punctuation",
        help="as the recipe's data.ctc_text",
    )
    parser.add_argument("--ctc-steps", type=int, default=200, help="steps with the CTC loss alone")
    parser.add_argument("--joint-steps", type=int, default=30, help="steps with both losses")
    options = parser.parse_args()
    torch.manual_seed(0)
    model = artifact.load(options.model).eval()
    model.set_stage("shrinking")
    data = samples(model, options.shards, options.clips, options.ctc_text)
    print(f"CTC WER before: {100 * ctc_word_error_rate(model, data):.1f} %")
    fit(model, data, options.ctc_steps, 16, ("ctc",), 1e-3)
    print(f"CTC WER after CTC alone: {100 * ctc_word_error_rate(model, data):.1f} %")
    fit(model, data, options.joint_steps, 8, ("ce", "ctc"), 3e-4)
    print(f"CTC WER: {100 * ctc_word_error_rate(model, data):.1f} %")
    described = {"recipe": {"data": {"ctc_text": options.ctc_text}}}
    artifact.save(model, options.out, described)


if __name__ == "__main__":
    main()
