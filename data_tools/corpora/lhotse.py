"""lhotse cut manifests (JSON lines, gzipped or not) and Shar folders; lhotse itself is not needed."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

from data_tools.corpora import CorpusError, Entry, Fault
from data_tools.corpora.table import open_text

_SHAR = ("shar", "memory")  # types of a source whose audio is a member of the tar beside


class Lhotse:
    """PATH is cuts.jsonl(.gz), or a Shar folder (cuts.N.jsonl.gz beside recording.N.tar).

    A cut with one supervision is one sample, and so is each supervision of a longer cut (its stretch of the recording).
    Recordings from files, commands and Shar are followed. Mixed and padded cuts are no plain audio and are reported, and so
    are cuts of recordings with several channels or with transforms, unless Shar holds them as they shall sound.
    root: where relative paths start (default: where the command runs).
    """

    def __init__(self, path: Path, root: str | None = None):
        self.root = Path(root or ".").absolute()
        self.manifests = sorted(path.glob("cuts.*.jsonl*")) if path.is_dir() else [path]
        if not self.manifests:
            raise CorpusError(f"{path} holds no cuts.*.jsonl: give a cut manifest or a Shar folder")

    def __iter__(self) -> Iterator[Entry | Fault]:
        for manifest in self.manifests:
            tar = manifest.with_name(manifest.name.split(".jsonl")[0].replace("cuts", "recording", 1) + ".tar")
            members = _members(tar) if tar.exists() else None
            with open_text(manifest) as file:
                for place, line in enumerate(file, 1):
                    if not line.strip():
                        continue
                    member = next(members, None) if members else None
                    try:
                        yield from self._samples(json.loads(line), f"{manifest.name}:{place}", member, tar if members else None)
                    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
                        yield Fault(f"{manifest.name}:{place}", "bad_json", f"{type(error).__name__}: {error}")

    def _audio(self, recording: dict, member: str | None) -> str | None:
        source = recording["sources"][0]
        if member is not None and source["type"] in _SHAR:
            return member
        if len(recording["sources"]) != 1:
            return None
        return {"file": lambda value: str(self.root / value), "command": lambda value: "pipe:" + value}.get(
            source["type"], lambda value: None
        )(source["source"])

    def _samples(self, cut: dict, where: str, member: str | None, tar: Path | None) -> Iterator[Entry | Fault]:
        name = cut.get("id", where)
        if cut.get("type", "MonoCut") not in ("MonoCut", "Cut") or "recording" not in cut:
            yield Fault(name, "bad_row", f"a {cut.get('type')}: only cuts of one recording can be packed")
            return
        audio, kind = self._audio(cut["recording"], member), cut["recording"]["sources"][0]["type"]
        if audio is None and tar is not None and member is None and kind in _SHAR:
            yield Fault(name, "truncated", f"{tar} ends before the cuts beside it do: copy or export it again")
            return
        if kind not in _SHAR and (why := _not_as_stored(cut["recording"])):
            yield Fault(name, "bad_row", why)
            return
        if audio is None:
            yield Fault(name, "bad_row", f"audio of type {kind} cannot be read here")
            return
        # A Shar member holds the cut alone: its time starts at 0.
        start = 0.0 if audio == member else float(cut["start"])
        supervisions = cut.get("supervisions") or [{}]
        for supervision in supervisions:
            several = len(supervisions) > 1
            offset = start + (float(supervision["start"]) if several else 0.0)
            duration = float(supervision["duration"]) if several else float(cut["duration"])
            whole = not several and offset == 0 and abs(duration - cut["recording"].get("duration", duration)) < 1e-3
            yield Entry(
                id=f"{name}@{supervision['id']}" if several else name,
                audio=audio,
                text=supervision.get("text"),
                lang=(supervision.get("language") or "").lower() or None,
                speaker=supervision.get("speaker"),
                task="asr",
                offset=None if whole else offset,
                duration=duration,
                recording=cut["recording"]["id"],
                group=cut["recording"]["id"] if audio.startswith("pipe:") and not whole else None,
            )


def _not_as_stored(recording: dict) -> str | None:
    """Why a stretch of the stored audio, its channels averaged, would not be what lhotse plays; None where it would be."""
    channels = sum(len(source.get("channels") or [0]) for source in recording["sources"])
    if channels > 1:  # of a telephone call, the other speaker would be heard too
        return f"a channel of a recording with {channels}: extract the channels to files first"
    # Another rate changes no times, and pack resamples by itself; another speed would move every stretch.
    if any(transform.get("name") != "Resample" for transform in recording.get("transforms") or ()):
        return "a recording with transforms: give the original cuts, or export them to Shar"
    return None


def _members(tar: Path) -> Iterator[str]:
    """Audio members of a Shar tar in order, as places to read from (a member `.nodata` stands for a cut without audio).

    A tar that was cut short ends early, wherever it was cut: each cut that misses its member is reported by itself.
    """
    try:
        with tarfile.open(tar) as archive:
            for member in archive:
                if member.isfile() and not member.name.endswith((".json", ".nometa")):
                    yield f"tar:{tar}#{member.offset_data}+{member.size}.{member.name.rpartition('.')[2]}"
    except tarfile.TarError:
        return
