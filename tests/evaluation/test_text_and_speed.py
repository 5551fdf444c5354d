"""Text retention, speed, and Whisper's own decoder as an anchor."""

import json
import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM, WhisperFeatureExtractor, WhisperForConditionalGeneration

from core.control_tokens import text_ids
from data_tools.shards import ShardIndex
from evaluation import compare, retention, score, speed, whisper_baseline
from evaluation.predictions import read_rows
from model import artifact
from model.soundwave import Soundwave
from model.trained_encoder import canonical
from stream.reader import decode
from tests.evaluation.conftest import byte_tokenizer


def test_retention_against_the_plain_base(parts, folders, tmp_path, capsys):
    """Without LoRA the LLM is the base as transformers loads it; with LoRA it is another one."""
    passages, questions = tmp_path / "p.txt", tmp_path / "q.jsonl"
    passages.write_text("A first passage.\n\nAnd one more, a little longer.\n")
    questions.write_text(json.dumps({"question": "Say a.", "accept": ["a"]}) + "\n")
    out = tmp_path / "r.json"
    arguments = [
        "--model",
        str(folders / "shrinking"),
        "--passages",
        str(passages),
        "--questions",
        str(questions),
        "--out",
        str(out),
        "--max-new-tokens",
        "8",
        "--device",
        "cpu",
    ]
    assert retention.main(arguments) == 0
    result = json.loads(out.read_text())
    base, tokenizer = LlamaForCausalLM.from_pretrained(parts / "llm"), byte_tokenizer()
    total = count = 0
    with torch.no_grad():
        for passage in ("A first passage.", "And one more, a little longer."):
            ids = tokenizer(passage, return_tensors="pt").input_ids
            total += float(base(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
            count += ids.shape[1] - 1
    assert result["perplexity"]["tokens"] == count
    assert result["perplexity"]["base"] == pytest.approx(math.exp(total / count), rel=1e-4)
    assert abs(result["perplexity"]["ratio"] - 1) > 1e-3
    assert result["questions"]["questions"] == 1 and len(result["answers"]) == 1
    shown = [line.split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    measured = result["perplexity"]
    assert [cell.strip() for cell in shown[2][1:4]] == [
        f"perplexity, {count} tokens",
        f"{measured['base']:.2f}",
        f"{measured['tuned']:.2f}",
    ]
    assert [row[1].strip() for row in shown[3:]] == ["right answers, 1 questions", "the same answers"]
    assert retention.main(["--model", str(folders / "alignment")]) == 2
    assert "leaves the LLM alone" in capsys.readouterr().err


@torch.no_grad()
@pytest.mark.parametrize("rank", [0, 2])  # LoRA may lie on top of trained weights
def test_retention_of_an_llm_trained_whole(parts, folders, rank, tmp_path):
    """Before is the base as transformers loads it, and the model is as it was afterwards."""
    config = artifact.read_config(folders / "shrinking")
    config.llm.lora_r = rank
    torch.manual_seed(2)
    model = Soundwave.build(config).eval()
    passage = "A passage of some words."
    with pytest.raises(ValueError, match="there is nothing to compare"):
        config.llm.lora_r = 0
        retention.retention(Soundwave.build(config), [passage], [])
    for name, parameter in model.llm.named_parameters():
        if ".mlp." in name or ".q_proj." in name or "lora_B" in name:
            parameter.add_(0.2 * torch.randn_like(parameter))
            if "lora_" not in name:
                model.tuned.add(canonical(f"llm.{name}"))
    ids = torch.tensor([text_ids(model.tokenizer, passage, add_special_tokens=True)])
    after = float(F.cross_entropy(model.llm(input_ids=ids).logits[0, :-1], ids[0, 1:]))
    base = LlamaForCausalLM.from_pretrained(parts / "llm")
    before = float(F.cross_entropy(base(input_ids=ids).logits[0, :-1], ids[0, 1:]))
    found = retention.retention(model, [passage, passage], [])["perplexity"]
    assert found["base"] == pytest.approx(math.exp(before), rel=1e-4)
    assert found["tuned"] == pytest.approx(math.exp(after), rel=1e-4)
    assert abs(found["ratio"] - 1) > 1e-3
    again = float(F.cross_entropy(model.llm(input_ids=ids).logits[0, :-1], ids[0, 1:]))
    assert again == after


@pytest.mark.parametrize(
    ("given", "accepted", "right"),
    [
        ("The capital is Paris.", ["paris"], True),
        ("Parisian food", ["paris"], False),
        ("It is London. Paris is not.", ["paris"], False),
        ("12", ["12", "twelve"], True),
        ("112", ["12"], False),
        ("H₂O is water", ["h₂o"], True),
        ("", ["x"], False),
    ],
)
def test_answers_are_read_as_whole_words(given, accepted, right):
    assert retention.is_right(given, accepted) is right


def test_shipped_questions_are_well_formed():
    items = [json.loads(line) for line in (retention.TEXT / "questions.jsonl").read_text().splitlines()]
    assert len(items) >= 40 and all(
        item["question"].endswith(("?", ".")) and item["accept"] for item in items
    )
    assert not any(
        retention.is_right(item["question"], item["accept"])
        for item in items
        if "Answer" not in item["question"] and "which is" not in item["question"].lower()
    )  # no question holds its answer


def test_speed_measures_every_stage(folders, packed, tmp_path):
    out = tmp_path / "s.json"
    for stage in ("shrinking", "alignment"):
        assert (
            speed.main(
                [
                    "--model",
                    str(folders / stage),
                    "--shards",
                    str(packed),
                    "--limit",
                    "3",
                    "--max-new-tokens",
                    "4",
                    "--device",
                    "cpu",
                    "--out",
                    str(out),
                ]
            )
            == 0
        )
        result = json.loads(out.read_text())
        assert result["clips"] == 3 and 0 < result["kept_per_second"] <= result["frames_per_second"]
        for clip in result["per_clip"]:
            assert clip["audio_path"] > 0
            assert stage == "alignment" or 0 < clip["first_token"] <= clip["total"]
        assert ("first_token_ms_median" in result) is (stage == "shrinking")


def test_speed_skips_a_broken_clip(folders, packed, tmp_path, capsys):
    out = tmp_path / "s.json"
    assert (
        speed.main(
            [
                "--model",
                str(folders / "alignment"),
                "--shards",
                str(packed),
                "--limit",
                "8",
                "--device",
                "cpu",
                "--out",
                str(out),
            ]
        )
        == 0
    )
    result = json.loads(out.read_text())
    assert result["clips"] == 7 and result["skipped"] == 1
    assert "skipped" in capsys.readouterr().out


@pytest.fixture(scope="module")
def whisper(parts, tmp_path_factory):
    """The tiny Whisper with a tokenizer beside it: a folder that can transcribe."""
    path = tmp_path_factory.mktemp("whisper")
    model = WhisperForConditionalGeneration.from_pretrained(parts / "whisper")
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and "embed_positions" not in name:
            torch.nn.init.normal_(parameter, std=0.5)
    model.generation_config.max_length = 12
    model.save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


def test_whisper_answers_as_transformers_does(whisper, folders, packed, tmp_path):
    """Batches of clips of any length against one clip at a time through transformers' own feature
    extractor."""
    out = tmp_path / "w.jsonl"
    assert (
        whisper_baseline.main(
            [
                "--whisper",
                str(whisper),
                "--shards",
                str(packed),
                "--out",
                str(out),
                "--batch",
                "3",
                "--device",
                "cpu",
            ]
        )
        == 0
    )
    rows = {row["id"]: row for row in read_rows(out)}
    assert len({row["prediction"] for row in rows.values()}) > 1  # the tiny model does listen
    assert len(rows) == 7 and json.loads(out.with_suffix(".scores.json").read_text())["rejected"] == 1
    model, tokenizer = WhisperForConditionalGeneration.from_pretrained(whisper), byte_tokenizer()
    extractor = WhisperFeatureExtractor()
    index = ShardIndex.load(packed)
    for number in (0, 3):
        audio, sample = index.read(number)
        features = extractor(decode(audio).numpy(), sampling_rate=16000, return_tensors="pt").input_features
        ids = model.generate(features, do_sample=False, num_beams=1)[0]
        assert rows[sample["id"]]["prediction"] == tokenizer.decode(ids, skip_special_tokens=True).strip()
    assert compare.compare(out, out)["tasks"]["asr"]["utterances"] == 7


def test_other_weights_in_the_same_folder_are_another_whisper(whisper, packed, tmp_path, capsys):
    path = tmp_path / "whisper"
    shutil.copytree(whisper, path)
    out = tmp_path / "w.jsonl"
    command = [
        "--whisper",
        str(path),
        "--shards",
        str(packed),
        "--out",
        str(out),
        "--limit",
        "1",
        "--device",
        "cpu",
    ]
    assert whisper_baseline.main(command) == whisper_baseline.main(command) == 0
    model = WhisperForConditionalGeneration.from_pretrained(path)
    torch.nn.init.normal_(model.model.encoder.conv1.weight)
    model.save_pretrained(path)
    assert whisper_baseline.main(command) == 2
    assert "made with other settings (weights was" in capsys.readouterr().err
    settings = out.with_suffix(
        ".run.json"
    )  # predictions made before the weights were noted are scored as ever
    settings.write_text(
        json.dumps({k: v for k, v in json.loads(settings.read_text()).items() if k != "weights"})
    )
    assert score.main([str(out)]) == 0


def test_whisper_gets_each_clip_s_own_language(whisper, packed):
    """Whatever other clips the batch holds: an unknown language in a batch made Whisper guess for all of it."""
    model = whisper_baseline.Whisper(whisper, torch.device("cpu"))
    languages = {"<|en|>": 250, "<|fr|>": 251, "<|de|>": 252}
    multilingual = {
        "lang_to_id": languages,
        "is_multilingual": True,
        "task_to_id": {"transcribe": 253, "translate": 254},
        "no_timestamps_token_id": 255,
    }
    for name, value in multilingual.items():
        setattr(model.model.generation_config, name, value)
    model.languages = languages
    index = ShardIndex.load(packed)
    clips = [decode(index.read(row)[0]) for row in (0, 1, 3)]
    assert [model.code_of(lang) for lang in ("fr-FR", "German", "klingon", None)] == ["fr", "de", None, None]

    def transcribed(clips, languages):
        """Without the padding behind shorter answers, which is no special token of the tiny tokenizer."""
        return ["".join(map(chr, ids)).rstrip("\0") for ids in model.transcribe(clips, languages)]

    told = {lang: [transcribed([clip], [lang])[0] for clip in clips] for lang in ("en", "fr", None)}
    assert told["en"] != told["fr"], "the tiny model does mind its language"
    assert transcribed(clips, ["fr", None, "en"]) == [told["fr"][0], told[None][1], told["en"][2]]
    assert transcribed(clips, ["fr", "klingon", "fr"]) == [told["fr"][0], told[None][1], told["fr"][2]]
