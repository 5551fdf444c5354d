"""lhotse cut manifests (JSON lines or lists, compressed or not) and Shar folders; lhotse itself is not
needed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core.tar_members import ignored_as
from data_tools.corpora import Entry, Ignored, Item, Reader, Rejection, as_name, kind_of_value
from data_tools.corpora.tars import LINKS, group_of, tar_members
from data_tools.text_files import CorpusError, json_items

_SHAR = ("shar", "memory")  # types of a source whose audio is a member of the tar beside
_NO_AUDIO = ".nodata"  # the member of a cut without audio


class Lhotse(Reader):
    """PATH is a cut manifest (cuts.jsonl, cuts.json), or a Shar folder (cuts.N.jsonl.gz beside
    recording.N.tar).

    A cut with one supervision is one sample, and so is each supervision of a longer cut (its stretch of the
    recording). Recordings from files, commands and Shar are followed; cuts of a Shar folder are matched with
    the members of the tar by their ids, and members without a cut are reported. Mixed and padded cuts are no
    plain audio and are reported, and so are cuts of recordings with several channels or with transforms,
    unless Shar holds them as they shall sound. root: where relative paths start (default: where the command
    runs).
    """

    broken = "bad_json"

    def __init__(self, path: Path, root: str | None = None):
        self.root = Path(root or ".").absolute()
        self.manifests = sorted(path.glob("cuts.*.jsonl*")) if path.is_dir() else [path]
        if not self.manifests:
            raise CorpusError(f"{path} holds no cuts.*.jsonl: give a cut manifest or a Shar folder")

    def records(self) -> Iterator[tuple[str, Any]]:
        for manifest in self.manifests:
            stem = manifest.name.split(".jsonl")[0].replace("cuts", "recording", 1)
            tar = next(
                (path for end in (".tar", ".tar.gz") if (path := manifest.with_name(stem + end)).exists()),
                None,
            )
            members = _Members(tar) if tar else None
            for place, cut in json_items(manifest, self.encoding):
                yield (
                    f"{manifest.name}:{place}",
                    cut if not isinstance(cut, dict) else (cut, members, manifest),
                )
            if members is not None:
                for name in members.left_over():
                    detail = f"{members.tar.name} holds audio of {name}, {manifest.name} has no such cut"
                    yield name, Rejection(name, "unmatched", detail)
                yield from (("", Ignored(heading, count)) for heading, count in members.ignored.items())

    def sample(self, record: Any, where: str) -> Item | list[Item]:
        if not isinstance(record, tuple):
            return Rejection(where, "bad_json", f"{kind_of_value(record)}, not an object")
        cut, members, manifest = record
        name = as_name(cut.get("id", where))
        member = members.take(name) if members is not None else None
        source = manifest.name.split(".jsonl")[0]
        return [
            item if isinstance(item, Rejection) else _of_source(item, source)
            for item in self._samples(cut, name, member, members)
        ]

    def _audio(self, recording: dict, member: str | None) -> str | None:
        source = recording["sources"][0]
        if source["type"] in _SHAR:
            return member
        if len(recording["sources"]) != 1:
            return None
        if source["type"] == "file":
            return str(self.root / source["source"])
        return f"pipe:{source['source']}" if source["type"] == "command" else None

    def _samples(
        self, cut: dict, name: str, member: str | None, members: _Members | None
    ) -> Iterator[Entry | Rejection]:
        kind = cut.get("type", "MonoCut")
        if kind not in ("MonoCut", "Cut") or "recording" not in cut:
            yield Rejection(name, "bad_row", _no_cut(cut))
            return
        audio, kind = self._audio(cut["recording"], member), cut["recording"]["sources"][0]["type"]
        if audio is None and members is not None and kind in _SHAR:
            yield members.missing(name)
            return
        if kind not in _SHAR and (why := _not_as_stored(cut["recording"])):
            yield Rejection(name, "bad_row", why)
            return
        if audio is None:
            yield Rejection(name, "bad_row", f"audio of type {kind} cannot be read here")
            return
        # A Shar member holds the cut alone: its time starts at 0.
        start = 0.0 if audio == member else float(cut["start"])
        supervisions = cut.get("supervisions") or [{}]
        for supervision in supervisions:
            several = len(supervisions) > 1
            offset = start + (float(supervision["start"]) if several else 0.0)
            duration = float(supervision["duration"]) if several else float(cut["duration"])
            whole = (
                not several
                and offset == 0
                and abs(duration - cut["recording"].get("duration", duration)) < 1e-3
            )
            yield Entry(
                id=f"{name}@{supervision['id']}" if several else name,
                audio=audio,
                text=supervision.get("text"),
                lang=(supervision.get("language") or "").lower() or None,
                speaker=as_name(supervision.get("speaker")),
                task="asr",
                offset=None if whole else offset,
                duration=duration,
                recording=as_name(cut["recording"]["id"]),
                group=cut["recording"]["id"] if audio.startswith("pipe:") and not whole else group_of(audio),
            )


def _of_source(entry: Entry, source: str) -> Entry:
    entry.source = source
    return entry


def _no_cut(cut: dict) -> str:
    """What a manifest's object is, where it is no cut of one recording."""
    if "type" in cut:
        return f"a {cut['type']}: only cuts of one recording can be packed"
    if "sources" in cut:
        return "a recording, not a cut: give the cut manifest (lhotse cut simple makes one of recordings and supervisions)"  # noqa: E501
    if "recording_id" in cut:
        return "a supervision, not a cut: give the cut manifest (lhotse cut simple makes one of recordings and supervisions)"  # noqa: E501
    return "no cut of a recording: it has no 'recording'"


def _not_as_stored(recording: dict) -> str | None:
    """Why a stretch of the stored audio, its channels averaged, would not be what lhotse plays; None where it
    would be."""
    channels = sum(len(source.get("channels") or [0]) for source in recording["sources"])
    if channels > 1:  # a telephone call has the other speaker on it
        return f"a channel of a recording with {channels}: extract the channels to files first"
    # Another rate changes no times, and pack resamples by itself; another speed would move every stretch.
    if any(transform.get("name") != "Resample" for transform in recording.get("transforms") or ()):
        return "a recording with transforms: give the original cuts, or export them to Shar"
    return None


@dataclass
class _Members:
    """Audio members of one Shar tar by the ids of their cuts. A tar that was cut short has those up to
    there."""

    tar: Path
    damage: Rejection | None = None
    ignored: dict[str, int] = field(default_factory=dict)
    _places: dict[str, list[str | None]] = field(default_factory=dict)
    _placeholders: set[str] = field(default_factory=set)

    def __post_init__(self):
        for member in tar_members(self.tar):
            if isinstance(member, Rejection):
                self.damage = member
                continue
            name, _, extension = member.name.rpartition(".")
            if f".{extension}" == _NO_AUDIO:
                self._placeholders.add(name)
            elif heading := (
                LINKS
                if member.is_special
                else _litter(member.name)
                if extension not in ("json", "nometa")
                else None
            ):
                self.ignored[heading] = self.ignored.get(heading, 0) + 1
            elif extension not in ("json", "nometa"):
                self._places.setdefault(name, []).append(member.place)

    def take(self, name: str) -> str | None:
        """The place of a cut's audio; of cuts of one id, in the order of the members."""
        places = self._places.get(name)
        if not places:
            return None
        place = places.pop(0)
        if not places:
            del self._places[name]
        return place

    def missing(self, name: str) -> Rejection:
        if name in self._placeholders:
            return Rejection(name, "no_audio", f"{self.tar.name} holds a placeholder: the cut had no audio")
        if self.damage is not None:
            return Rejection(
                name, "truncated", f"{self.tar} ends before the cuts beside it do: copy or export it again"
            )
        return Rejection(name, "missing_file", f"{self.tar.name} holds no audio of this cut")

    def left_over(self) -> Iterator[str]:
        for name, places in self._places.items():
            yield from [name] * len(places)


def _litter(name: str) -> str | None:
    heading = ignored_as(name)
    return (
        heading if heading and heading.startswith("files of") else None
    )  # of audio, Shar's format may be any extension
