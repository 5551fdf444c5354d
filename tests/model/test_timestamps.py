"""Word times: against the CTC head's full log-probabilities, and in recordings whose frames are known."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from core.ctc_text import ctc_target_ids
from core.spelling import spell
from model import artifact
from model.alignment import CTCHead
from model.config import OpsConfig
from model.generation import recordings
from model.generation.recordings import align_recording
from model.generation.timestamps import END_ADVANCE, START_DELAY, align, frames, word_times
from model.waveforms import SoundWarning
from tests.model import tiny
from tests.model.conftest import build

TEXTS = ["The wall, the law!", "all", "We ate — they’ll call."]
SECONDS = [4.0, 2.6, 5.2]


def sounds(seconds=SECONDS) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [0.1 * torch.randn(round(s * 16000), generator=generator) for s in seconds]


def best_path(log_probs: torch.Tensor, ids: list[int], blank: int) -> list[int | None]:
    """The place in ids that each frame emits on the best path, over full log-probabilities [T, V]."""
    states = [blank, *(state for token in ids for state in (token, blank))]
    best = {0: (float(log_probs[0, blank]), [0])}
    if ids:
        best[1] = (float(log_probs[0, ids[0]]), [1])
    for row in log_probs[1:].tolist():
        longer = {}
        for state, token in enumerate(states):
            sources = [state, state - 1]
            if token != blank and state > 1 and states[state - 2] != token:
                sources.append(state - 2)
            ways = [best[source] for source in sources if source in best]
            if ways:
                score, path = max(ways, key=lambda way: way[0])
                longer[state] = (score + row[token], [*path, state])
        best = longer
    _, path = max(
        (best[state] for state in (len(states) - 1, len(states) - 2) if state in best), key=lambda w: w[0]
    )
    return [state // 2 if state % 2 else None for state in path]


@pytest.mark.parametrize("head", ["tied", "free"])
def test_words_are_where_full_log_probabilities_put_them(folders, head):
    model = build(folders, parts=("encoder", "adapters"), ctc_head=head)
    model.ctc_text = "lower_no_punctuation"
    waveforms = sounds()
    found = word_times(model, waveforms, TEXTS, ["en"] * 3)
    step = model.config.alignment.stack_frames / 50
    for waveform, text, words in zip(waveforms, TEXTS, found, strict=False):
        hidden, lengths = frames(model, [waveform])
        log_probs = model.ctc_head.log_probs(hidden[0, : lengths[0]]).detach()
        spelling = spell(model.tokenizer, text, model.ctc_text, "en")
        path = best_path(log_probs, spelling.ids, model.ctc_head.blank)
        assert [word.text for word in words] == spelling.words
        duration = len(waveform) / 16000
        starts = []
        for parts in spelling.parts:
            first = next(t for t, place in enumerate(path) if place == parts[0].place)
            last = max(t for t, place in enumerate(path) if place == parts[-1].place)
            peaks = [
                max(
                    float(log_probs[t, spelling.ids[p.place]])
                    for t, place in enumerate(path)
                    if place == p.place
                )
                for p in parts
            ]
            starts.append((first * step, (last + 1) * step, sum(peaks) / len(peaks)))
        for number, (word, (start, end, logprob)) in enumerate(zip(words, starts, strict=False)):
            limit = max(0.0, starts[number + 1][0] - START_DELAY) if number + 1 < len(starts) else duration
            assert word.start == pytest.approx(max(0.0, start - START_DELAY), abs=1e-6)
            assert word.end == pytest.approx(
                max(word.start, min(end + END_ADVANCE, limit, duration)), abs=1e-6
            )
            assert word.confidence == pytest.approx(torch.tensor(logprob).exp().item(), rel=1e-3, abs=1e-9)


def test_a_batch_changes_nothing(model):
    waveforms = sounds()
    together = word_times(model, waveforms, TEXTS)
    for waveform, text, words in zip(waveforms, TEXTS, together, strict=False):
        alone = word_times(model, [waveform], [text])[0]
        assert [word.text for word in alone] == [word.text for word in words]
        for one, other in zip(alone, words, strict=False):
            assert (one.start, one.end) == pytest.approx((other.start, other.end), abs=1e-6)
    batch = tiny.batch_of(model, [], waveforms, [None] * 3)
    assert [[w.text for w in words] for words in word_times(model, batch, TEXTS)] == [
        [w.text for w in words] for words in together
    ]


def test_what_cannot_be_aligned_is_named(model):
    waveforms = sounds([0.5, 0.5, 0.5, 0.3])
    texts = ["", "...", "far too many words for half a second", "a"]
    model.ctc_text = "lower_no_punctuation"
    with pytest.warns(SoundWarning) as caught:
        words = word_times(model, waveforms, texts)
    messages = [str(warning.message) for warning in caught]
    assert any("waveform 1 has no word times: nothing of its text is a CTC target" in m for m in messages)
    assert any("waveform 2 has no word times: its text needs" in m for m in messages)
    assert len(messages) == 2
    assert words[0] == []
    assert [(w.text, w.start, w.end, w.confidence) for w in words[1]] == [("...", 0.0, 0.5, 0.0)]
    assert [word.text for word in words[2]] == texts[2].split()
    assert words[2][0].start == 0 and words[2][-1].end == pytest.approx(0.5)
    assert all(word.confidence == 0 for word in words[2])
    assert words[3][0].confidence > 0
    assert [one.problem is None for one in align(model, waveforms, texts)] == [False, False, False, True]
    assert word_times(model, [], []) == []


def test_clips_without_samples_are_named(model):
    waveforms = [torch.zeros(0), sounds([2.0])[0]]
    with pytest.warns(SoundWarning, match="waveform 0 has no word times: it has no audio"):
        words = word_times(model, waveforms, ["the wall", "the wall"])
    assert [(w.start, w.end, w.confidence) for w in words[0]] == [(0.0, 0.0, 0.0)] * 2
    assert words[1] == word_times(model, waveforms[1:], ["the wall"])[0]
    assert align_recording(model, waveforms[0], "the wall").problem == "it has no audio"


def test_wrong_counts_and_long_clips_are_refused(model):
    with pytest.raises(ValueError, match="1 waveforms, 2 texts and 2 languages"):
        word_times(model, sounds([1.0]), ["a", "b"])
    model.config.encoder.max_seconds = 0.5
    with pytest.raises(ValueError, match="waveform 0 lasts 1.0 s, this model takes 0.5 s at most"):
        word_times(model, sounds([1.0]), ["a"])


def test_words_without_targets_take_no_time(model):
    model.ctc_text = "lower_no_punctuation"
    words = word_times(model, sounds([2.0]), ["the ( wall ) all"], ["en"])[0]
    assert [word.text for word in words] == ["the", "( wall )", "all"]
    assert all(b.start >= a.end for a, b in zip(words, words[1:], strict=False))


def test_characters_are_words_in_scripts_without_spaces(model):
    model.ctc_text = "lower"
    words = word_times(model, sounds([4.0]), ["你好，世界"], ["zh"])[0]
    assert [word.text for word in words] == ["你", "好，", "世", "界"]
    assert all(a.start < b.start and a.end <= b.start + 1e-9 for a, b in zip(words, words[1:], strict=False))


def test_a_model_folder_brings_its_ctc_text(folders, tmp_path):
    model = build(folders, parts=("encoder", "adapters"))
    assert model.ctc_text == "lower"
    artifact.save(model, tmp_path / "model", {"recipe": {"data": {"ctc_text": "lower_no_punctuation"}}})
    assert artifact.load(tmp_path / "model").ctc_text == "lower_no_punctuation"


# ---- recordings ----


def known_recording(words: int, seed: int = 0, most_pause: int = 40):
    """A CTC head whose frames say a known text at known frames: (model, text, first frames, frames)."""
    tokenizer = tiny.tokenizer()
    generator = torch.Generator().manual_seed(seed)
    vocabulary = ["the", "wall", "all", "a", "law", "we"]
    chosen = [vocabulary[i] for i in torch.randint(len(vocabulary), (words,), generator=generator)]
    size = len(tokenizer) + 1
    blank, emitted, firsts = size - 1, [], []
    for word in chosen:
        emitted += [blank] * int(torch.randint(2, most_pause, (1,), generator=generator))
        firsts.append(len(emitted))
        for token in ctc_target_ids(tokenizer, word, "lower"):
            emitted += [token, blank]
    emitted += [blank] * 20
    hidden = 12.0 * torch.nn.functional.one_hot(torch.tensor(emitted), size).float()
    hidden += 0.1 * torch.randn(hidden.shape, generator=generator)
    head = CTCHead("free", torch.zeros(size - 1, size), 1.0, blank, OpsConfig())
    head.weight.data = torch.eye(size)
    model = SimpleNamespace(
        tokenizer=tokenizer,
        ctc_text="lower",
        ctc_head=head,
        encoder=None,
        config=SimpleNamespace(alignment=SimpleNamespace(stack_frames=4)),
    )
    return model, " ".join(chosen), firsts, hidden


@pytest.mark.parametrize("section", [20.0, 60.0, 10_000.0])
def test_sections_find_every_word_of_a_recording(monkeypatch, section):
    model, text, firsts, hidden = known_recording(150)
    monkeypatch.setattr(recordings, "recording_frames", lambda *_: hidden)
    alignment = align_recording(model, torch.zeros(len(hidden) * 1280), text, "en", section=section)
    assert alignment.problem is None
    assert [word.text for word in alignment.words] == text.split()
    assert [word.start for word in alignment.words] == pytest.approx(
        [t * 0.08 - START_DELAY for t in firsts], abs=1e-6
    )
    assert min(word.confidence for word in alignment.words) > 0.9


def test_a_text_longer_than_its_recording_is_counted(monkeypatch):
    model, text, firsts, hidden = known_recording(60)
    short = hidden[: firsts[40]]
    monkeypatch.setattr(recordings, "recording_frames", lambda *_: short)
    alignment = align_recording(
        model, torch.zeros(len(short) * 1280), text + " wall" * 2000, "en", section=30.0
    )
    assert "the audio ends before" in alignment.problem
    assert len(alignment.words) == 2060
    assert [w.start for w in alignment.words[:38]] == pytest.approx(
        [t * 0.08 - START_DELAY for t in firsts[:38]], abs=1e-6
    )
    assert alignment.words[-1].confidence == 0 and alignment.words[-1].start == alignment.words[-1].end


def test_a_recording_that_ends_long_after_its_text(monkeypatch):
    model, text, firsts, hidden = known_recording(20)
    blank = torch.zeros(3000, hidden.shape[1])
    blank[:, -1] = 12.0
    longer = torch.cat([hidden, blank])
    monkeypatch.setattr(recordings, "recording_frames", lambda *_: longer)
    alignment = align_recording(model, torch.zeros(len(longer) * 1280), text, "en", section=30.0)
    assert alignment.problem is None
    assert [word.start for word in alignment.words] == pytest.approx(
        [t * 0.08 - START_DELAY for t in firsts], abs=1e-6
    )


@pytest.mark.parametrize("seconds", [0.05, 4.0, 9.0, 61.3])
@pytest.mark.parametrize("trained", [None, 4.0, 0.3])
def test_windows_are_joined_without_a_gap(monkeypatch, seconds, trained):
    """An encoder that gives each frame's own samples: whatever the windows, the whole recording's."""
    step = 1280

    def blocks(_, waveforms):
        longest = -(-max(map(len, waveforms)) // step) * step
        padded = torch.stack([torch.nn.functional.pad(w, (0, longest - len(w))) for w in waveforms])
        return padded.unflatten(1, (-1, step)), torch.tensor([-(-len(w) // step) for w in waveforms])

    monkeypatch.setattr(recordings, "frames", blocks)
    model, *_ = known_recording(1)
    model.trained_seconds, model.config.encoder = trained, SimpleNamespace(max_seconds=20.0)
    waveform = sounds([seconds])[0]
    whole, _ = blocks(model, [waveform])
    assert torch.equal(recordings.recording_frames(model, waveform), whole[0])


@pytest.mark.parametrize(
    "text, problem", [("", "it has no words"), ("...", "nothing of its text is a CTC target")]
)
def test_recordings_without_targets(model, text, problem):
    model.ctc_text = "lower_no_punctuation"
    assert problem in align_recording(model, sounds([1.0])[0], text).problem


def test_backends_give_the_same_times(model, monkeypatch):
    waveforms = sounds()
    words = word_times(model, waveforms, TEXTS)
    monkeypatch.setattr("model.ops.align.cpp_backend", SimpleNamespace(available=lambda: False))
    assert word_times(model, waveforms, TEXTS) == words
