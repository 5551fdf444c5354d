"""Which members of a tar are a sample: written examples, and any order of members."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.tar_members import Grouper, Member, ignored_as, is_text_sample, read_record, stands_alone


def grouped(names, most_bytes=float("inf"), size=1):
    """[(key, names)] of all groups in the order in which they come."""
    grouper = Grouper(lambda group: False, most_bytes)
    groups = [group for name in names for group in grouper.add(Member(name, None, size))] + list(
        grouper.end()
    )
    return [(group.key, sorted(member.name for member in group.members)) for group in groups]


CASES = {
    "plain": (["u1.wav", "u1.json"], {"u1": ["u1.json", "u1.wav"]}),
    "dots in ids": (
        [
            "sp0.9-u1.wav",
            "sp0.9-u1.txt",
            "sp0.9-u2.wav",
            "sp0.9-u2.txt",
            "v1.txt",
            "v1.0_u3.wav",
            "v1.0_u3.txt",
        ],
        {
            "sp0.9-u1": ["sp0.9-u1.txt", "sp0.9-u1.wav"],
            "sp0.9-u2": ["sp0.9-u2.txt", "sp0.9-u2.wav"],
            "v1": ["v1.txt"],
            "v1.0_u3": ["v1.0_u3.txt", "v1.0_u3.wav"],
        },
    ),
    "a role before the extension": (["a.audio.wav", "a.json"], {"a": ["a.audio.wav", "a.json"]}),
    "two roles": (["k.audio.flac", "k.meta.json"], {"k": ["k.audio.flac", "k.meta.json"]}),
    "roles after dotted ids": (
        ["x.b.speech.wav", "x.b.json", "x.c.speech.wav", "x.c.json"],
        {"x.b": ["x.b.json", "x.b.speech.wav"], "x.c": ["x.c.json", "x.c.speech.wav"]},
    ),
    "words that are no roles": (
        ["book.one.wav", "book.two.txt"],
        {"book.one": ["book.one.wav"], "book.two": ["book.two.txt"]},
    ),
    "an extension as a part of the id": (["T.WAV.wav", "T.WAV.txt"], {"T.WAV": ["T.WAV.txt", "T.WAV.wav"]}),
    "folders": (
        ["d/u1.wav", "e/u1.wav", "d/u1.txt", "e/u1.txt"],
        {"d/u1": ["d/u1.txt", "d/u1.wav"], "e/u1": ["e/u1.txt", "e/u1.wav"]},
    ),
    "channels": (["g.json", "g.left.wav", "g.right.wav"], {"g": ["g.json", "g.left.wav", "g.right.wav"]}),
    "capitals": (["a.WAV", "a.TXT"], {"a": ["a.TXT", "a.WAV"]}),
}


@pytest.mark.parametrize("names, wanted", CASES.values(), ids=CASES)
def test_members_of_each_kind_of_name(names, wanted):
    assert dict(grouped(names)) == wanted
    assert dict(grouped(sorted(names))) == dict(grouped(names[::-1])) == wanted, "the order does not matter"


def test_several_audio_members_are_a_problem():
    grouper = Grouper(lambda group: False)
    groups = [g for name in ("f.wav", "f.flac", "f.json") for g in grouper.add(Member(name, None))] + list(
        grouper.end()
    )
    (group,) = groups
    assert "f.wav, f.flac" in group.problem


@settings(max_examples=100, deadline=None)
@given(
    keys=st.lists(
        st.sampled_from(["u1", "u2", "sp0.9-u1", "a.b", "x/u1", "1.5"]), min_size=1, max_size=5, unique=True
    ),
    data=st.data(),
)
def test_any_order_gives_the_same_samples_and_each_member_comes_once(keys, data):
    names = [f"{key}.{extension}" for key in keys for extension in ("wav", "txt")]
    shuffled = data.draw(st.permutations(names))
    found = grouped(shuffled)
    assert dict(found) == {key: [f"{key}.txt", f"{key}.wav"] for key in keys} and len(found) == len(keys)
    lost = data.draw(st.sampled_from(names))
    found = grouped([name for name in shuffled if name != lost])
    assert sorted(name for _, members in found for name in members) == sorted(set(names) - {lost})


def test_neighbours_do_not_wait_and_what_waits_is_bounded():
    grouper = Grouper(lambda group: False, most_bytes=10)
    assert [
        group.key for name in ("a.wav", "a.txt", "b.wav") for group in grouper.add(Member(name, None, 4))
    ] == ["a"]
    came = [
        group.key
        for name in ("c.wav", "d.wav", "e.wav", "e.txt")
        for group in grouper.add(Member(name, None, 4))
    ]
    assert came == ["b"], "the oldest that waits is given up, as an incomplete group"
    assert [group.key for group in grouper.end()] == ["e", "c", "d"]


@pytest.mark.parametrize(
    "name, heading",
    [
        ("._u1.wav", "files of"),
        ("d/._u1.json", "files of"),
        ("__MACOSX/u1.wav", "files of"),
        (".DS_Store", "files of"),
        ("u1.npy", ".npy members"),
        ("README", "without a known extension"),
        ("u1.wav", None),
        ("u1.m4a", None),
        ("u1.lab", None),
    ],
)
def test_what_is_ignored_has_a_heading(name, heading):
    found = ignored_as(name)
    assert found is None if heading is None else heading in found


def test_the_record_of_a_sample():
    assert read_record(b'{"text": "a"}', b"b") == {"text": "a"}
    assert read_record(b'{"text": "", "sentence": "s"}', None)["text"] == "s"
    assert read_record(None, b"\xef\xbb\xbfwords\n")["text"] == "words\n"
    for broken in (b"[1]", b"{", b'"x"'):
        with pytest.raises(ValueError):
            read_record(broken, None)
    with pytest.raises(UnicodeDecodeError):
        read_record(None, "señor".encode("latin-1"))


@pytest.mark.parametrize(
    "record, is_text",
    [
        (
            {"id": "t", "task": "text", "prompt": "a", "response": "b", "duration": 0.0, "sample_rate": None},
            True,
        ),
        ({"prompt": "a", "response": "b"}, True),
        ({"messages": [{"role": "user", "content": "x"}]}, True),
        ({"messages": [{"role": "user", "content": "<audio_patch>"}]}, False),
        ({"task": "translation", "prompt": "a", "response": "b"}, False),
        ({"text": "x"}, False),
        ({"prompt": "a", "response": "b", "duration": 3.5}, False),
    ],
)
def test_json_without_audio_is_a_text_sample_only_where_it_never_had_any(record, is_text):
    assert is_text_sample(record) == is_text
    assert not stands_alone(json.dumps(record).encode()) or is_text
