"""Measure a step of stage 2 against a naive implementation on the same data, in one run.

    python -m benchmarks.train_step RECIPE [key=value ...] [--clips 12] [--steps 5] [--out FILE]

RECIPE: a stage 2 recipe (models, corpora, optimizer) with a Whisper encoder; its corpora's transcribed clips
are measured. `init_from=DIR` starts from a trained stage 1, so that frames shrink as they do in training. Two
corpora of the same speech: the clips as they are, and joined to lengths like LibriSpeech's (12 s on average,
35 s at most). Ways:

    ours    train.engine on the training stream: true length, shrinking, the fused CTC op, balanced
            micro-batches, no full logits
    plain   the same modules and weights in a plain PyTorch loop, one utterance at a time as the authors' code
            does: padded to 30 s, all CTC logits (over the padding too) and all LLM logits materialised, runs
            found frame by frame, torch's AdamW. Its CTC table is frozen as a whole, which spares it the
            gradient of the blank's row
    bare    the matrix products that ours has to compute, alone: no norms, no activations, no autograd, no
            data

Ours does the recipe's steps 1 to --steps, plain the first --plain-steps steps; numbers are means. Learning
rates are 0 in both ways: the arithmetic is that of training, and the frames that are kept stay the same. A
part's seconds are taken around its module; "other" is what no part accounts for.

Marks: ours >= 5 x plain on clips as they are (2.6 s on average in the quick start), >= 2 x on
LibriSpeech-like lengths; waiting for data <= 1 % of the step; other <= 3 %.
"""

from __future__ import annotations

import io
import statistics
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import soundfile
import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import nn
from tqdm import tqdm

from benchmarks.machine import keep, machine, settings
from core.command_line import CommandParser, accept_old_name
from core.distributed import Ranks, connect, disconnect, fill_environment
from data_tools.shards import ShardIndex, ShardWriter, write_index
from model import artifact
from model.batch import Batch
from model.dropout import position_keys
from model.language_model import base_of, token_keys_in_use
from model.pretrained import locate
from model.soundwave import Soundwave
from recipe.config import Corpus, MixtureConfig, Recipe, RecipeError, load_recipe
from stream import Plan, Stream
from stream.collate import Collator
from stream.plan import load_index
from stream.reader import SAMPLE_RATE, Sample, decode
from train import deepspeed_config

PADDED_SECONDS = 30
PARTS = (
    "data wait",
    "encoder",
    "alignment",
    "ctc",
    "shrinking",
    "splice",
    "llm",
    "cross-entropy",
    "backward",
    "update",
)


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


# --- corpora ------------------------------------------------------------------------------------------------


def librispeech_lengths(count: int, seed: int = 0) -> np.ndarray:
    """Seconds of `count` utterances: most 12 to 16 s, a shoulder of shorter ones, few up to 35 s; mean about
    12. A stand-in for the histogram of LibriSpeech's train-960, not a sample of it."""
    random = np.random.default_rng(seed)
    kind = random.random(count)
    short, usual, long = (
        random.uniform(1.5, 12, count),
        random.normal(14.2, 1.6, count),
        random.uniform(17, 35, count),
    )
    return np.clip(np.where(kind < 0.3, short, np.where(kind < 0.98, usual, long)), 1.5, 35.0)


def joined(folders: list[str], target: Path, count: int) -> Path:
    """Transcribed clips of packed folders, joined end to end to LibriSpeech-like lengths, as a packed
    folder."""
    clips = []
    for folder in folders:
        index = ShardIndex.load(folder)
        asr = [
            row
            for row in range(len(index))
            if index.samples["audio_size"][row] and index.samples["characters"][row]
        ]
        clips += [(index, row) for row in asr]
    if not clips:
        raise RecipeError(f"{', '.join(folders)}: no transcribed clip to join")
    order = iter(np.random.default_rng(1).permutation(len(clips)).tolist() * 1000)
    target.mkdir(parents=True)
    writer = ShardWriter(target / "joined-000000.tar")
    for number, seconds in enumerate(
        tqdm(librispeech_lengths(count), desc="join clips", unit="clip", leave=False)
    ):
        waves, words, samples = [], [], 0
        while True:
            audio, meta = ShardIndex.read(*clips[next(order)])
            wave = decode(audio)[: 35 * SAMPLE_RATE - samples]
            if waves and samples + len(wave) / 2 > seconds * SAMPLE_RATE:
                break
            waves.append(wave)
            words.append(str(meta["text"]))
            samples += len(wave)
        buffer = io.BytesIO()
        soundfile.write(buffer, torch.cat(waves).numpy(), SAMPLE_RATE, format="FLAC")
        writer.add(
            f"{number:09d}",
            buffer.getvalue(),
            "flac",
            {
                "id": f"joined-{number}",
                "corpus": "joined",
                "task": "asr",
                "text": " ".join(words),
                "lang": "en",
                "duration": samples / SAMPLE_RATE,
                "sample_rate": SAMPLE_RATE,
            },
        )
    write_index(target, "joined", [writer.close("joined-000000.tar")])
    return target


# --- ours ---------------------------------------------------------------------------------------------------


class Clock:
    """Seconds of each part, taken around modules and calls."""

    def __init__(self):
        self.seconds, self.handles = dict.fromkeys(PARTS, 0.0), []

    @contextmanager
    def __call__(self, part: str):
        wait()
        started = time.perf_counter()
        yield
        wait()
        self.seconds[part] += time.perf_counter() - started

    def watch(self, module: nn.Module, part: str) -> None:
        """Hooks of this module that run outside of those added later (the head's, which hold the
        cross-entropy)."""
        started = []

        def start(*_):
            wait()
            started.append(time.perf_counter())

        def stop(*_):
            wait()
            self.seconds[part] += time.perf_counter() - started.pop()

        self.handles += [module.register_forward_pre_hook(start), module.register_forward_hook(stop)]

    def wrap(self, owner: object, name: str, part: str) -> None:
        inner = getattr(owner, name)

        def timed(*args, **kwargs):
            with self(part):
                return inner(*args, **kwargs)

        setattr(owner, name, timed)


def shape_of(recipe: Recipe, model: Soundwave, step: int, device: str) -> dict:
    """Return the sizes of a step's GEMMs; lengths in frames of the encoder, of the adapter,
    and LLM positions."""
    shape = {"encoder": [], "adapter": [], "kept": [], "rows": [], "targets": []}
    stream = Stream(recipe.data, recipe.stage, model.tokenizer, recipe.model, 0, 1, step, step + 1)
    model.eval()
    with torch.no_grad():
        for batch in next(iter(stream)).micro_batches:
            batch = batch.to(device)
            audio = model.encode_audio(batch)
            _, mask, labels = model.embeddings(batch, audio)
            shape["encoder"].append(model.encoder.frames(batch.audio_lengths).tolist())
            shape["adapter"].append(audio.lengths.tolist())
            shape["kept"].append(audio.kept_lengths.tolist())
            shape["rows"].append(mask.sum(1).tolist())
            shape["targets"].append(int((labels[:, 1:] != -100).sum()))
    stream.close()
    return shape


def ours(recipe: Recipe, model: Soundwave, ranks: Ranks, steps: int) -> dict:
    from recipe.stages import stage_of
    from train.engine import Engine

    plan = Plan.open(recipe.data, recipe.stage, steps + 1)
    stream = Stream(recipe.data, recipe.stage, model.tokenizer, recipe.model, 0, 1, 0, steps + 1, plan=plan)
    width = locate(recipe.model.llm.name, sizes_only=True).config.hidden_size
    engine = Engine(model, recipe, stage_of(recipe), deepspeed_config.resolve(recipe, width), ranks)
    clock = Clock()
    for module, part in (
        (model.encoder, "encoder"),
        (model.alignment, "alignment"),
        (model.ctc_head, "ctc"),
        (model.shrinking, "shrinking"),
        (model.llm, "llm"),
        (base_of(model.llm).get_output_embeddings(), "cross-entropy"),
    ):
        clock.watch(module, part)
    clock.wrap(model, "embeddings", "splice")
    clock.wrap(engine.deepspeed, "backward", "backward")
    clock.wrap(engine.deepspeed, "step", "update")
    totals, parts, audio, padded, clips, sums = [], [], 0.0, 0.0, 0, []
    batches = iter(stream)
    for step in tqdm(range(steps + 1), desc="ours", unit="step", leave=False):
        clock.seconds = dict.fromkeys(PARTS, 0.0)
        wait()
        started = time.perf_counter()
        with clock("data wait"):
            batch = next(batches)
        counts = engine.reduce_step_counts(batch.micro_batches)
        result = engine.step(step, batch.micro_batches, counts)
        wait()
        seconds = time.perf_counter() - started
        if step:  # the first one warms up
            clock.seconds["llm"] -= clock.seconds["cross-entropy"]  # it runs inside
            clock.seconds["splice"] -= clock.seconds["shrinking"]
            totals.append(seconds)
            parts.append({**clock.seconds, "other": seconds - sum(clock.seconds.values())})
            audio, padded, clips = audio + batch.seconds, padded + batch.padded_seconds, clips + batch.samples
            sums.append(result.sums)
    stream.close()
    for handle in clock.handles:
        handle.remove()
    spent = sum(totals)
    return {
        "step_seconds": statistics.mean(totals),
        "clips_a_step": clips / steps,
        "audio_seconds_a_step": audio / steps,
        "audio_seconds_per_second": audio / spent,
        "padding_share": 1 - audio / padded,
        "shrink_ratio": sum(s["kept"] for s in sums) / sum(s["frames"] for s in sums),
        "micro_batches": statistics.mean(s["micro_batches"] for s in sums),
        "loss": result.loss,
        "last_step_seconds": totals[-1],
        "parts": {name: sum(p[name] for p in parts) / spent for name in (*PARTS, "other")},
    }


# --- the naive implementation -------------------------------------------------------------------------------


def plain_loss(model: Soundwave, batch: Batch, table: torch.Tensor, ctc_weight: float) -> torch.Tensor:
    """One utterance, everything materialised: CE (mean over its targets) + ctc_weight x CTC."""
    padding = PADDED_SECONDS * SAMPLE_RATE
    samples = max(padding, batch.waveforms.shape[1])
    waveform = F.pad(batch.waveforms, (0, samples - batch.waveforms.shape[1]))
    features, frames = model.encoder(waveform, torch.tensor([samples], device=waveform.device))
    hidden, length = model.alignment(features, frames, batch.audio_keys)
    logits = hidden[0] @ table.t()  # [T, V + 1]
    log_probabilities = logits.float().log_softmax(-1)
    ctc = F.ctc_loss(
        log_probabilities,
        batch.ctc_targets[0],
        length[0],
        batch.ctc_target_lengths[0],
        blank=model.ctc_head.blank,
        zero_infinity=True,
    )
    best = logits.argmax(-1).tolist()
    kept = [
        t
        for t, token in enumerate(best)
        if token != model.ctc_head.blank and (t == 0 or token != best[t - 1])
    ] or [0]
    shrunk = model.shrinking.compress(
        hidden,
        length,
        torch.tensor([kept], device=hidden.device),
        torch.tensor([len(kept)], device=hidden.device),
        batch.audio_keys,
    )[0]
    ids, labels = batch.input_ids[0], batch.labels[0]
    text = base_of(model.llm).get_input_embeddings()(ids.masked_fill(ids == model.audio_id, 0))
    at = int((ids == model.audio_id).nonzero())
    embeddings = torch.cat([text[:at], shrunk.to(text.dtype), text[at + 1 :]])
    labels = torch.cat([labels[:at], labels.new_full((len(kept),), -100), labels[at + 1 :]])
    with token_keys_in_use(model.llm, position_keys(batch.row_keys, len(embeddings))):
        logits = model.llm(inputs_embeds=embeddings[None], use_cache=False).logits[0]  # [L, V]
    ce = F.cross_entropy(logits[:-1].float(), labels[1:], ignore_index=-100)
    return ce + ctc_weight * ctc


def plain(recipe: Recipe, model: Soundwave, ranks: Ranks, steps: int) -> dict:
    plan = Plan.open(recipe.data, recipe.stage, steps + 1)
    collator = Collator(model.tokenizer, recipe.model, recipe.stage, recipe.data.ctc_text)
    trained = [p for group in model.parameter_groups().values() for _, p in group]
    optimizer = torch.optim.AdamW(trained, lr=0.0, fused=torch.cuda.is_available())
    head = model.ctc_head
    table = (
        head.weight
        if head.blank_row is None
        else torch.cat([head.weight, head.blank_row[None].to(head.weight.dtype)])
    )
    table = table.detach().clone()
    model.train()

    def utterance(entry: np.void, number: int) -> None:
        audio, meta = plan.indexes[entry["corpus"]].read(int(entry["row"]))
        batch = collator([collator.prepare(Sample(meta, decode(audio)))]).to(ranks.device)
        (plain_loss(model, batch, table, recipe.loss.ctc_weight) / number).backward()

    totals, audio = [], 0.0
    utterance(plan.global_batch(0)[0], 1)  # warms up
    for step in range(1, steps + 1):
        entries = plan.global_batch(step)
        entries = entries[np.random.default_rng(step).permutation(len(entries))]  # no bucketing
        wait()
        started = time.perf_counter()
        optimizer.zero_grad()
        for entry in tqdm(entries, desc=f"plain, step {step} of {steps}", unit="clip", leave=False):
            utterance(entry, len(entries))
        torch.nn.utils.clip_grad_norm_(trained, recipe.optim.grad_clip)
        optimizer.step()
        wait()
        totals.append(time.perf_counter() - started)
        audio += float(entries["seconds"].sum())
    optimizer.zero_grad()
    return {"step_seconds": statistics.mean(totals), "audio_seconds_per_second": audio / sum(totals)}


# --- GEMM only ----------------------------------------------------------------------------------------------


def products(model: Soundwave, shape: dict) -> list[tuple[str, int, tuple[int, ...]]]:
    """(part, how often, (b, m, k, n)) of every matrix product of a step; b matrices at once where it is
    attention."""
    result = []

    def linears(part: str, module: nn.Module, positions: int, times: int, weight_too: bool) -> None:
        for name, layer in module.named_modules():
            if isinstance(layer, nn.Linear):
                trained = layer.weight.requires_grad and weight_too
                result.append((part, times + trained, (1, positions, layer.in_features, layer.out_features)))
            elif isinstance(layer, nn.Conv1d):  # Whisper's: the first runs before the stride
                rate = 2 if name.endswith("conv1") else 1
                result.append(
                    (
                        part,
                        times,
                        (1, rate * positions, layer.in_channels * layer.kernel_size[0], layer.out_channels),
                    )
                )

    def attention(
        part: str, lengths: list[int], over: list[int], heads: int, width: int, layers: int, times: int
    ) -> None:
        for queries, keys in zip(lengths, over, strict=True):
            result.append((part, 2 * times * layers, (heads, queries, width // heads, keys)))

    llm, head = base_of(model.llm).config.get_text_config(), model.ctc_head
    rows, width = head.weight.shape
    network = model.encoder.layers
    for encoder, adapter, kept, llm_rows, targets in zip(
        *(shape[k] for k in ("encoder", "adapter", "kept", "rows", "targets")), strict=True
    ):
        linears("encoder", model.encoder, sum(encoder), 1, False)
        attention(
            "encoder",
            encoder,
            encoder,
            network.config.encoder_attention_heads,
            model.encoder.width,
            len(network.layers),
            1,
        )
        result.append(("alignment", 2, (1, sum(adapter), model.alignment.projection.in_features, width)))
        for layer in model.alignment.layers:
            linears("alignment", layer, sum(adapter), 2, True)
            attention("alignment", adapter, adapter, layer.heads, width, 1, 3)
        result.append(("ctc", 2 + (head.kind != "tied"), (1, sum(adapter), width, rows)))
        for layer, positions in (
            (getattr(model.shrinking, name, None), count)
            for name, count in (("query", sum(kept)), ("key_value", sum(adapter)), ("out", sum(kept)))
        ):
            if layer is not None:
                result.append(("shrinking", 3, (1, positions, layer.in_features, layer.out_features)))
        attention("shrinking", kept, adapter, model.shrinking.heads, width, 1, 3)
        linears("llm", base_of(model.llm).get_decoder(), sum(llm_rows), 2, True)
        attention(
            "llm", llm_rows, llm_rows, llm.num_attention_heads, llm.hidden_size, llm.num_hidden_layers, 3
        )
        result.append(("cross-entropy", 2, (1, targets, width, rows)))
    return result


def bare(model: Soundwave, shape: dict, device: str) -> dict[str, float]:
    """Seconds of the products of one step, by part, forward and backward together."""
    counted: dict[tuple[str, tuple[int, ...]], int] = {}
    for part, times, sizes in products(model, shape):
        counted[part, sizes] = counted.get((part, sizes), 0) + times
    dtype, seconds = next(model.llm.parameters()).dtype, dict.fromkeys(counted, 0.0)
    for (part, sizes), times in tqdm(counted.items(), desc="GEMM only", unit="shape", leave=False):
        b, m, k, n = sizes
        left = torch.randn(b, m, k, device=device).to(dtype)
        # The weight lies [n, k], as a Linear's does.
        right, out = (
            torch.randn(b, n, k, device=device).to(dtype).mT,
            torch.empty(b, m, n, device=device, dtype=dtype),
        )
        taken = []
        for _ in range(4):
            wait()
            started = time.perf_counter()
            torch.bmm(left, right, out=out)
            wait()
            taken.append(time.perf_counter() - started)
        seconds[part, sizes] = times * statistics.median(taken[1:])
    parts = dict.fromkeys((part for part, _ in counted), 0.0)
    for (part, _), value in seconds.items():
        parts[part] += value
    return parts


# --- all of it ----------------------------------------------------------------------------------------------


def compare(recipe: Recipe, ranks: Ranks, clips: int, steps: int, plain_steps: int) -> dict:
    """Both ways on the recipe's corpora, about `clips` utterances a step."""
    plan = Plan.open(recipe.data, recipe.stage, 1)
    lengths = np.concatenate(
        [np.asarray(i.samples["duration"])[np.asarray(i.samples["audio_size"]) > 0] for i in plan.indexes]
    )
    recipe = replace(recipe, data=replace(recipe.data, batch_seconds=float(clips * lengths.mean())))
    torch.manual_seed(recipe.seed)
    model = Soundwave.build(recipe.model, device=ranks.device)
    if recipe.init_from:
        artifact.load_trained(model, Path(recipe.init_from))
    model.set_stage(recipe.stage)
    theirs = plain(recipe, model, ranks, plain_steps)
    shape = shape_of(recipe, model, steps, ranks.device)
    alone = bare(model, shape, ranks.device)
    mine = ours(recipe, model, ranks, steps)
    return {
        "mean_seconds": float(lengths.mean()),
        "longest_seconds": float(lengths.max()),
        "ours": mine,
        "plain": theirs,
        "times_plain": mine["audio_seconds_per_second"] / theirs["audio_seconds_per_second"],
        "bare": {
            "parts_seconds": alone,
            "seconds": sum(alone.values()),
            "share_of_ours": sum(alone.values()) / mine["last_step_seconds"],
        },
    }


def report_text(name: str, result: dict) -> str:
    mine, theirs = result["ours"], result["plain"]
    rows = [
        ("ours", f"{mine['step_seconds']:.2f}", f"{mine['audio_seconds_per_second']:.2f}"),
        ("plain", f"{theirs['step_seconds']:.2f}", f"{theirs['audio_seconds_per_second']:.2f}"),
        ("GEMM only, of our last step", f"{result['bare']['seconds']:.2f}", ""),
    ]
    head = (
        f"{name}: clips of {result['mean_seconds']:.1f} s on average, {result['longest_seconds']:.1f} s at "
        f"most; "
        f"{mine['clips_a_step']:.1f} a step in {mine['micro_batches']:.1f} micro-batches, "
        f"padding {mine['padding_share']:.1%}, {mine['shrink_ratio']:.1%} of the frames kept\n"
    )
    table = tabulate(rows, headers=("way", "s / step", "audio s / s"), tablefmt="github")
    parts = tabulate(
        [[f"{mine['parts'][p]:.1%}" for p in (*PARTS, "other")]], headers=(*PARTS, "other"), tablefmt="github"
    )
    return (
        f"{head}{table}\nours is {result['times_plain']:.1f} x plain; GEMM only is "
        f"{result['bare']['share_of_ours']:.0%} of our step. Where our step goes:\n{parts}\n"
    )


def main(argv: list[str] | None = None) -> int:
    parser = CommandParser(
        "python -m benchmarks.train_step", __doc__, example="examples/quickstart/stage2.yaml"
    )
    parser.add_argument("recipe", help="recipe of the measured stage")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="recipe keys to change")
    parser.add_argument("--clips", type=int, default=12, help="utterances a step, about")
    parser.add_argument("--steps", type=int, default=5, help="measured steps of ours")
    parser.add_argument(
        "--plain-steps", type=int, default=2, help="measured steps of the naive implementation"
    )
    parser.add_argument("--joined", type=int, default=100, help="LibriSpeech-like utterances to make")
    parser.add_argument("--out", type=Path, help="where to write the numbers, the table beside them (.txt)")
    accept_old_name(parser, "--json", "--out")
    options = parser.parse_intermixed_args(argv)
    try:
        still = ["optim.lr_adapters=0", "optim.lr_ctc_head=0", "optim.lr_lora=0"]
        plain_data = [
            "data.cache_features=null",
            "data.spec_augment=false",
            "data.speed_perturb=[]",
            "data.noise_snr_db=[]",
        ]
        recipe = load_recipe(options.recipe, [*options.overrides, "stage=shrinking", *still, *plain_data])
        folders = [c.shards for c in recipe.data.train if "asr" in load_index(c.shards).tasks]
        if not folders:
            raise RecipeError(
                "data.train names no packed folder with the task asr, which both ways are measured on"
            )
    except RecipeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    recipe.data.mixture = MixtureConfig()
    recipe.data.train = [Corpus(shards=folder, tasks=["asr"]) for folder in folders]
    fill_environment()
    ranks = connect()
    report = {
        "machine": machine("cuda" if torch.cuda.is_available() else "cpu"),
        "results": {},
        "options": settings(options),
    }
    texts = []
    with tempfile.TemporaryDirectory() as scratch:
        made = joined(folders, Path(scratch) / "joined", options.joined)
        long = replace(recipe.data, train=[Corpus(shards=str(made))], max_seconds=35.0)
        for name, data in (("clips as they are", recipe.data), ("LibriSpeech-like", long)):
            result = compare(
                replace(recipe, data=data), ranks, options.clips, options.steps, options.plain_steps
            )
            report["results"][name] = result
            texts.append(report_text(name, result))
            print(texts[-1], flush=True)
    if options.out:
        keep(options.out, report, "\n".join(texts))
    disconnect()
    return 0


if __name__ == "__main__":
    sys.exit(main())
