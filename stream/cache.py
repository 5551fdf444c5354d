"""Compute the frozen encoder's output once per utterance and keep it on disk.

    python -m stream.cache RECIPE

    FOLDER/<key>/settings.json            encoder, its fingerprint and settings: what the key is a hash of
    FOLDER/<key>/<name>.npy               [frames of all utterances of the pack, width] float16
    FOLDER/<key>/<name>.index.npy         ENTRY_DTYPE, one row per utterance; written last, so it vouches for
                                          the pack

The key is made of the encoder's fingerprint and of the settings that change its output. A clip is found by
the hash of its bytes: packing a corpus again in another order finds what is there, and several tasks on one
clip share it. A pack holds about ten minutes of audio: that much is lost by an interruption, and what was
finished is never computed again.

The trade: 50 frames a second x width x 2 bytes, i.e. 0.18 GB an hour for Whisper base and 0.46 GB for
large-v3 (a 10,000 hour corpus: 4.6 TB), against an encoder forward per utterance and pass. Augmented audio
has no place in it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import sys
import time
from collections import OrderedDict
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from core.command_line import CommandParser
from core.distributed import gather
from data_tools.shards import ShardIndex, replace_file
from model import identity
from model.config import SoundwaveConfig
from model.encoder import Encoder, build_encoder, tensor_prefix
from model.pretrained import DTYPES, attention_implementation, fingerprint, locate
from recipe.config import Recipe, RecipeError, load_recipe
from recipe.stages import check_train
from stream.augment import check
from stream.plan import drawn_share, load_index, usable
from stream.reader import decode, read_with_retry
from stream.rejected import BrokenSample
from stream.selection import select, share_of_each

ENTRY_DTYPE = np.dtype([("key", "<u8"), ("start", "<u8"), ("frames", "<u4")])
PACK_SECONDS = 600.0
_OPEN_PACKS = 64
LOGGER = logging.getLogger(__name__)


class Interrupted(Exception):
    """A rank was asked to stop, and all have stopped, between two packs: the next start continues from there.
    The message is the reason."""


def sample_keys(samples: np.ndarray) -> np.ndarray:
    """uint64 [N] of index rows: the audio itself, so that several tasks on one clip share its features."""
    return samples["audio_hash"]


_encoder_fingerprint = lru_cache(maxsize=4)(fingerprint)


def _settings(config: SoundwaveConfig) -> dict:
    """What the encoder's output depends on."""
    source = locate(config.encoder.name)
    return {
        "encoder": _encoder_fingerprint(source.folder, tensor_prefix(source)),
        "pad_to_seconds": config.encoder.pad_to_seconds,
        "padded_length": config.alignment.ctc_length == "full",
        "dtype": config.dtype,
    }


def cache_folder(folder: str | Path, config: SoundwaveConfig) -> Path:
    text = json.dumps(_settings(config), sort_keys=True)
    return Path(folder).expanduser() / hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def check_encoder(folder: Path, config: SoundwaveConfig) -> None:
    """The folder's name identifies the encoder's tensors; its configuration and preprocessor must be the
    same, too. Errors: RecipeError."""
    stored = json.loads((folder / "settings.json").read_text()).get("identity")
    if stored is None:
        LOGGER.warning(
            "%s does not record the encoder's config.json and preprocessor (an earlier version made it): "
            "only its "
            "tensors "
            "were compared",
            folder,
        )
        return
    for lines in identity.changes(stored, identity.encoder_settings(locate(config.encoder.name))).values():
        raise RecipeError(
            f"data.cache_features: {folder} holds what another configuration of this encoder gave "
            f"({'; '.join(lines[:5])}): "
            "give the encoder its old files back, or name another folder"
        )


class FeatureStore:
    """Reads cached features. width: of a frame; frame_rate: frames per second."""

    def __init__(self, folder: Path):
        self.folder = folder
        facts = json.loads((folder / "settings.json").read_text())
        self.width, self.frame_rate = int(facts["width"]), float(facts["frame_rate"])
        self._packs, tables, spoilt = [], [], 0
        for path in sorted(folder.glob("*.index.npy")):
            pack = path.with_name(path.name.replace(".index.npy", ".npy"))
            try:
                table = np.load(path)
                whole = pack.stat().st_size >= 2 * self.width * int(table["frames"].sum())
            except (OSError, ValueError, EOFError):
                whole = False
            spoilt += not whole
            if whole:  # of the others nothing is known here: they are computed again
                self._packs.append(pack)
                tables.append(table)
        if spoilt:
            LOGGER.warning(
                "%s: %d packs of features are missing or cut short, and are left out", folder, spoilt
            )
        tables = tables or [np.empty(0, ENTRY_DTYPE)]
        entries = np.concatenate(tables)
        pack_of = np.repeat(np.arange(len(tables)), [len(table) for table in tables])
        order = np.argsort(entries["key"], kind="stable")
        self._entries, self._pack = entries[order], pack_of[order]
        self._open: OrderedDict[int, np.ndarray] = OrderedDict()

    @classmethod
    def open(cls, folder: str | Path, config: SoundwaveConfig) -> FeatureStore:
        """Errors: RecipeError where nothing was cached for this encoder and these settings."""
        path = cache_folder(folder, config)
        if not (path / "settings.json").exists():
            raise RecipeError(
                f"data.cache_features: '{folder}' holds nothing for this encoder and its settings "
                f"({path.name}): "
                "run python -m stream.cache RECIPE first"
            )
        check_encoder(path, config)
        return cls(path)

    def __len__(self) -> int:
        return len(self._entries)

    def _find(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where keys [N] stand, and whether they do."""
        at = np.minimum(np.searchsorted(self._entries["key"], keys), max(len(self._entries) - 1, 0))
        is_cached = self._entries["key"][at] == keys if len(self._entries) else np.zeros(len(keys), bool)
        return at, is_cached

    def has(self, samples: np.ndarray) -> np.ndarray:
        """bool [N] of index rows."""
        return self._find(sample_keys(samples))[1]

    def read(self, sample: np.void) -> torch.Tensor:
        """Features [T, width] float16 of one index row. Errors: BrokenSample where they are missing."""
        at, is_cached = self._find(sample_keys(np.atleast_1d(sample)))
        if not is_cached[0]:
            raise BrokenSample(f"no cached features in {self.folder}: run python -m stream.cache RECIPE")
        entry, number = self._entries[at[0]], int(self._pack[at[0]])
        if number in self._open:
            self._open.move_to_end(number)
        else:
            try:
                self._open[number] = np.load(self._packs[number], mmap_mode="r")
            except (OSError, ValueError, EOFError) as error:
                raise BrokenSample(f"its features in {self._packs[number]} cannot be read: {error}") from None
            if len(self._open) > _OPEN_PACKS:
                self._open.popitem(last=False)
        start = int(entry["start"])
        return torch.from_numpy(np.array(self._open[number][start : start + int(entry["frames"])]))


def _write_pack(folder: Path, keys: list[int], features: list[np.ndarray]) -> None:
    """One pack, complete or not there. features: [T, width] float16 each."""
    lengths = np.array([len(f) for f in features])
    table = np.zeros(len(keys), ENTRY_DTYPE)
    table["key"], table["frames"], table["start"] = keys, lengths, np.r_[0, np.cumsum(lengths)[:-1]]
    name = hashlib.blake2b(table["key"].tobytes(), digest_size=8).hexdigest()
    for suffix, array in ((".npy", np.concatenate(features)), (".index.npy", table)):
        unfinished = folder / f".{name}{suffix}.{os.getpid()}"
        with open(unfinished, "wb") as file:
            np.save(file, array)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, folder / f"{name}{suffix}")


def _needed(recipe: Recipe) -> list[tuple[ShardIndex, np.ndarray]]:
    """Rows with audio that training or validation may read."""
    data, chosen = recipe.data, []
    for corpus in data.train:
        index = load_index(corpus.shards)
        samples = np.asarray(index.samples)
        wanted = usable(samples, data, recipe.stage)[""]
        if corpus.tasks is not None:
            wanted &= np.isin(
                samples["task"], [index.tasks.index(t) for t in corpus.tasks if t in index.tasks]
            )
        if (drawn := drawn_share(samples, corpus)) is not None:
            wanted &= drawn
        chosen.append((index, np.flatnonzero(wanted)))
    for corpus in data.valid:
        index = load_index(corpus.shards)
        entries = select(index, 0, recipe.stage, corpus, share_of_each(data, recipe.log.validate_utterances))
        entries = entries[entries["seconds"] <= recipe.model.encoder.max_seconds]  # the others are left out
        chosen.append((index, entries["row"].astype(int)))
    return [(index, rows[index.samples[rows]["audio_size"] > 0]) for index, rows in chosen]


def _packs(
    needed: list[tuple[ShardIndex, np.ndarray]], store: FeatureStore, rank: int, world_size: int
) -> list[list[tuple[ShardIndex, int]]]:
    """A rank's part of what is missing, each utterance once, by falling length, cut into packs of about
    PACK_SECONDS.

    Parts are dealt by key, not by place in the list: ranks that look at different times, while others already
    write, agree.
    """
    missing, seen = [], set()
    for index, rows in needed:
        rows = rows[~store.has(index.samples[rows])]
        for row, key in zip(rows.tolist(), sample_keys(index.samples[rows]).tolist(), strict=True):
            if key % world_size == rank and key not in seen:
                seen.add(key)
                missing.append((float(index.samples["duration"][row]), key, index, row))
    missing.sort(key=lambda item: (-item[0], item[1]))
    packs: list[list[tuple[ShardIndex, int]]] = []
    seconds = PACK_SECONDS
    for duration, _, index, row in missing:
        if seconds + duration > PACK_SECONDS:
            packs.append([])
            seconds = 0.0
        packs[-1].append((index, row))
        seconds += duration
    return packs


def _encode(encoder: Encoder, clips: list[torch.Tensor], padded: bool) -> list[np.ndarray]:
    device = next(encoder.parameters()).device
    lengths = torch.tensor([len(clip) for clip in clips])
    features, frames = encoder(pad_sequence(clips, batch_first=True).to(device), lengths.to(device), padded)
    return [f[:n].to("cpu", torch.float16).numpy() for f, n in zip(features, frames.tolist(), strict=True)]


def _fill_pack(
    folder: Path,
    pack: list[tuple[ShardIndex, int]],
    encoder: Encoder,
    padded: bool,
    batch_seconds: float,
    progress: tqdm,
) -> int:
    """Encode and write one pack; returns the number of utterances that could not be read."""
    keys: list[int] = []
    features: list[np.ndarray] = []
    broken = 0
    waiting: list[tuple[int, torch.Tensor]] = []

    def flush() -> None:
        if waiting:
            features.extend(_encode(encoder, [clip for _, clip in waiting], padded))
            keys.extend(key for key, _ in waiting)
            progress.update(sum(len(clip) for _, clip in waiting) / 16000)
            waiting.clear()

    for index, row in pack:
        try:
            audio, _, _ = read_with_retry(index, row)
            clip = decode(audio or b"")  # only rows with audio are needed
        except BrokenSample as error:
            broken += 1
            LOGGER.warning("no features for sample %d of %s: %s", row, index.location, error)
            continue
        if (
            waiting
            and max(len(clip), *(len(c) for _, c in waiting)) * (len(waiting) + 1) > batch_seconds * 16000
        ):
            flush()
        waiting.append((int(sample_keys(index.samples[row : row + 1])[0]), clip))
    flush()
    if any(not np.isfinite(f).all() for f in features):
        raise RuntimeError(
            "the encoder's output does not fit float16: do without data.cache_features for this encoder"
        )
    if keys:
        _write_pack(folder, keys, features)
    return broken


def ensure_features(
    recipe: Recipe,
    model=None,
    rank: int = 0,
    world_size: int = 1,
    stop_reason: Callable[[float], str | None] = lambda seconds: None,
) -> FeatureStore | None:
    """Compute whatever features data.train and data.valid lack; every rank does its share of the packs.

    The ranks meet after every pack: none waits for another longer than that takes (a collective has a time
    limit), and all stop together. stop_reason: given the seconds that the last pack took, why this rank must
    stop, or None (train/preemption.py). Nothing to do (and None) where data.cache_features is not set. model:
    lends its encoder; None, or a model built without one: the encoder alone is loaded, and only where
    something is missing. Call it before ZeRO-3 partitions parameters.
    Errors: RecipeError; Interrupted; RuntimeError for a partitioned encoder.
    """
    data, config = recipe.data, recipe.model
    if not data.cache_features:
        return None
    check(data)
    check_train(recipe)
    folder = cache_folder(data.cache_features, config)
    folder.mkdir(parents=True, exist_ok=True)
    encoder = getattr(model, "encoder", None)
    if not (folder / "settings.json").exists():
        source = locate(config.encoder.name)
        sizes = encoder or build_encoder(config.encoder, source, DTYPES[config.dtype], "sdpa", weights=False)
        facts = {
            **_settings(config),
            "name": config.encoder.name,
            "width": sizes.width,
            "frame_rate": sizes.frame_rate,
            "identity": identity.encoder_settings(source),
        }
        replace_file(folder / "settings.json", (json.dumps(facts, indent=1) + "\n").encode())
    check_encoder(folder, config)
    packs = _packs(_needed(recipe), FeatureStore(folder), rank, world_size)
    if packs:
        if encoder is None:
            attention = attention_implementation(config.attention_implementation, DTYPES[config.dtype])
            encoder = build_encoder(
                config.encoder, locate(config.encoder.name), DTYPES[config.dtype], attention
            )
            if torch.cuda.is_available():
                encoder = encoder.cuda()
        if any(hasattr(parameter, "ds_id") for parameter in encoder.parameters()):
            raise RuntimeError(
                "ensure_features: ZeRO-3 has partitioned the encoder already; call it before "
                "deepspeed.initialize"
            )
    seconds = sum(float(index.samples["duration"][row]) for pack in packs for index, row in pack)
    padded = config.alignment.ctc_length == "full"
    broken, took = 0, 0.0
    with tqdm(
        total=math.ceil(seconds), unit="s", desc="encoder features", disable=rank != 0 or not packs
    ) as progress:
        while True:
            left, reasons = zip(*gather((len(packs), stop_reason(took))), strict=True)
            if not any(left):
                break
            if any(reasons):
                raise Interrupted(
                    "; ".join(f"{why} on rank {number}" for number, why in enumerate(reasons) if why)
                )
            if packs and encoder is not None:
                started = time.monotonic()
                broken += _fill_pack(
                    folder, packs.pop(0), encoder, padded, data.micro_batch_seconds, progress
                )
                took = time.monotonic() - started
    if broken:
        LOGGER.warning("%d utterances have no features; training names and replaces them", broken)
    return FeatureStore(folder)


def main(arguments: list[str] | None = None) -> int:
    parser = CommandParser(
        "python -m stream.cache",
        "Fill data.cache_features of a recipe. With "
        "RANK and WORLD_SIZE set, several processes share the work.",
        example="train/recipes/stage1.yaml",
    )
    parser.add_argument("recipe", help="recipe file")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="recipe keys to change")
    options = parser.parse_args(arguments)
    try:
        recipe = load_recipe(options.recipe, options.overrides)
        if not recipe.data.cache_features:
            raise RecipeError(
                f"{options.recipe}: data.cache_features is not set; name a folder for the features"
            )
        rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        store = ensure_features(recipe, None, rank, world_size)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if store is not None:
        print(f"{len(store)} utterances in {store.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
