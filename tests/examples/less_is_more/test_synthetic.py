"""Synthetic speech: sentences chosen for their words, none that a test asks for, and a speaker that is named
when it refuses.

flite's place is taken by a script that writes a WAV of 0.1 s a word: the real one is a Debian package that
tests do not fetch.
"""

import json
import sys
from collections import Counter

import pytest
import soundfile

from examples.less_is_more import synthetic
from examples.quickstart.fetch import FetchError
from tests.model.tiny import tokenizer

LINES = {
    "noun": """  1 This software and database is being provided to you
00001740 03 n 01 cat 0 000 | a feline; "the cat sat on a far-off mat"; "too short"; "The cat sat on a far-off mat"
00001741 03 n 01 dog 0 000 | a canine; "the dog ate 3 bones"; "he said... nothing at all"; "a dog slept here"
""",
    "verb": '00001742 29 v 01 run 0 000 | move fast; "she ran home at once"; "the held out sentence"',
    "adj": "00001743 00 a 01 odd 0 000 | strange",
    "adv": '00001744 02 r 01 fast 0 000 | "the cat sat here"',
}
SCRIPT = f"""#!{sys.executable}
import sys, wave
said = dict(zip(sys.argv[1::2], sys.argv[2::2]))
if "refused" in said["-t"]:
    sys.exit("no such voice")
with wave.open(said["-o"], "wb") as file:
    file.setparams((1, 2, 16000, 0, "NONE", ""))
    file.writeframes(bytes(3200 * len(said["-t"].split())))
"""


@pytest.fixture
def wordnet(tmp_path):
    folder = tmp_path / "wordnet"
    folder.mkdir()
    for kind, lines in LINES.items():
        (folder / f"data.{kind}").write_text(lines, encoding="latin-1")
    return folder


@pytest.fixture
def flite(tmp_path):
    path = tmp_path / "flite"
    path.write_text(SCRIPT)
    path.chmod(0o755)
    return synthetic.Flite(str(path))


def test_only_plain_sentences_each_once(wordnet):
    assert set(synthetic.sentences(wordnet)) == {
        "the cat sat on a far off mat",
        "a dog slept here",
        "she ran home at once",
        "the held out sentence",
        "the cat sat here",
    }


def test_rare_words_come_first_and_every_round_wants_one_more():
    numbers: dict[str, int] = {}

    def tokens_of(text: str) -> list[int]:
        return [numbers.setdefault(word, len(numbers)) for word in text.split()]

    texts = [
        "known known known",
        "known rare known",
        "known rare rare",
        "known once known",
        "known seldom known",
    ]
    shown = tokens_of("known known known known once once")
    a_second = synthetic.REST + 3 * synthetic.WORD
    assert synthetic.choose(texts, tokens_of, shown, 1.5 * a_second) == [
        "known rare known",
        "known seldom known",
    ]
    assert (
        synthetic.choose(texts, tokens_of, shown, 2.5 * a_second)[2] == "known rare rare"
    )  # the second round
    everything = synthetic.choose(texts, tokens_of, shown, 5 * a_second)
    assert Counter(everything) == Counter(texts)
    with pytest.raises(FetchError, match="ask for less"):
        synthetic.choose(texts, tokens_of, shown, 3600)


def test_clips_and_manifest_are_made_once_without_held_out_sentences(tmp_path, wordnet, flite, monkeypatch):
    cache = tmp_path / "cache"
    tokenizer().save_pretrained(cache / "models" / "smollm2-135m")
    (cache / "manifests").mkdir()
    for name, text in (("dialogues-train", "A word."), ("dialogues-test", "The held-out sentence!")):
        text = text.replace("-", " ")
        (cache / "manifests" / f"{name}.jsonl").write_text(json.dumps({"text": text, "task": "asr"}) + "\n")
    monkeypatch.setattr(synthetic, "packages", lambda _: (wordnet, flite))
    rows = [json.loads(line) for line in synthetic.build(cache, 7 / 3600).read_text().splitlines()]
    assert 3 <= len(rows) <= 4 and {row["corpus"] for row in rows} == {"synthetic"}
    assert "the held out sentence" not in {row["text"] for row in rows}
    for row in rows:
        assert (
            soundfile.info(row["audio"]).duration
            == pytest.approx(row["duration"])
            == pytest.approx(0.1 * len(row["text"].split()))
        )
    monkeypatch.setattr(synthetic, "speak", lambda *_: pytest.fail("made again"))
    synthetic.build(cache, 7 / 3600)


def test_a_speaker_that_refuses_is_quoted(tmp_path, flite):
    with pytest.raises(
        FetchError, match="flite refused 'a refused text' .exit 1.: no such voice; does .* list slt"
    ):
        flite.speak("a refused text", "slt", 1.0, tmp_path / "x.wav")
