"""The official layout in and out, against a plain implementation of the authors' network (release.py) on
configurations made here."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

from model import artifact
from model.batch import Batch
from model.config import official_switches
from model.convert import main as convert
from model.official import ShardWriter
from model.prompt import chat_ids
from model.soundwave import Soundwave
from model.stages import STAGES, chosen
from tests.model import tiny
from tests.model.check_release_layout import TEXT
from tests.model.check_release_layout import main as check_release_layout
from tests.model.release import ReleasedSoundwave


def release_tokenizer(extra: tuple[str, ...] = ("<audio_patch>",), pad: str = "<|pad|>"):
    words = tiny.tokenizer("llama3", extra)
    words.pad_token = pad
    return words


def released_configs(
    words, *, width=32, layers=2, heads=4, kv=2, mels=16, encoder_width=24, encoder_layers=2, spare=0, ffn=48
):
    config = dict(
        vocab_size=len(words) + spare,
        hidden_size=width,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        rms_norm_eps=1e-6,
        rope_theta=500000.0,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=words.eos_token_id,
        max_position_embeddings=4096,
        model_type="Soundwave",
        transformers_version="4.43.1",
        adapter_size=encoder_width,
        audio_tower="encoder",
        audio_patch_size=1,
        audio_patch_token=words.convert_tokens_to_ids("<audio_patch>"),
        llm_pad_token_id=words.pad_token_id,
    )
    encoder = dict(
        d_model=encoder_width,
        encoder_layers=encoder_layers,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=2 * encoder_width,
        decoder_ffn_dim=2 * encoder_width,
        num_mel_bins=mels,
        vocab_size=40,
        max_source_positions=1500,
        pad_token_id=0,
        model_type="whisper",
    )
    return config, encoder


def write_release(folder: Path, words, config: dict, encoder: dict, seed: int = 0) -> ReleasedSoundwave:
    released = ReleasedSoundwave.random(config, encoder, seed)
    (folder / "encoder").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "encoder" / "config.json").write_text(json.dumps(encoder))
    save_file({n: t.contiguous() for n, t in released.state_dict().items()}, folder / "model.safetensors")
    words.save_pretrained(folder)
    return released


def release_batch(model, mel, input_ids, labels=None, targets=None, pad=None) -> Batch:
    """The authors' inputs as our batch: the encoder's output at 30 s, ids, masks."""
    audios = len(mel)
    features = model.encoder.encode_mel(mel, torch.full((audios,), mel.shape[-1]))
    targets = torch.full((audios, 1), -100) if targets is None else targets
    mask = torch.ones_like(input_ids) if pad is None else (input_ids != pad).long()
    return Batch(
        None,
        features,
        torch.full((audios,), features.shape[1]),
        False,
        targets.clamp(min=0),
        (targets != -100).sum(1),
        (targets != -100).any(1),
        input_ids,
        mask,
        torch.full_like(input_ids, -100) if labels is None else labels,
    )


def compare(model, mel, prompts, expected_tokens, expected_logits, training, pad):
    """Tokens equal, logits within 1e-4, losses within 1e-4 relative, singly and all prompts in one batch."""
    for i, ids in enumerate(prompts):
        batch = release_batch(model, mel[i : i + 1], ids[None])
        audio = model.encode_audio(batch)
        assert torch.equal(audio.argmax[0], expected_tokens[i])
        embeddings, mask, _ = model.embeddings(batch, audio)
        logits = model.llm(inputs_embeds=embeddings, attention_mask=mask).logits[0]
        assert logits.shape == expected_logits[i].shape
        assert (logits - expected_logits[i]).abs().max() < 1e-4
    together = release_batch(model, mel, torch.stack(prompts))
    embeddings, mask, _ = model.embeddings(together, model.encode_audio(together), left_padded=True)
    logits = model.llm(
        inputs_embeds=embeddings, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)
    ).logits
    for i, expected in enumerate(expected_logits):
        assert (logits[i, -len(expected) :] - expected).abs().max() < 1e-4

    ids, labels, targets, expected_ce, expected_loss = training
    batch = release_batch(model, mel, ids, labels, targets, pad)
    output = model(batch, losses=("ce", "ctc"))
    ce = output.ce_sum / batch.ce_count
    loss = ce + 0.3 * output.ctc_sum / batch.ctc_count
    torch.testing.assert_close(ce, expected_ce, rtol=1e-4, atol=0)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-4, atol=0)


SHAPES = [
    dict(),
    dict(width=48, layers=3, heads=6, kv=3, mels=20, encoder_width=16, encoder_layers=1, spare=7, ffn=40),
]


def spoken(mels: int, generator: torch.Generator) -> torch.Tensor:
    mel = torch.randn(3, mels, 3000, generator=generator).cumsum(-1).mul(0.05).sin()
    mel[1, :, 900:] = -0.4  # trailing silence
    mel[2, :, 60:] = -0.4
    return mel


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_release_in_and_out(tmp_path, shape):
    words = release_tokenizer()
    config, encoder = released_configs(words, **shape)
    released = write_release(tmp_path / "released", words, config, encoder)
    assert convert(["--from-official", str(tmp_path / "released"), "--out", str(tmp_path / "ours")]) == 0
    model = artifact.load(tmp_path / "ours")

    generator = torch.Generator().manual_seed(3)
    mel = spoken(encoder["num_mel_bins"], generator)
    audio_id, pad = config["audio_patch_token"], config["llm_pad_token_id"]
    prompts = [torch.randint(0, 250, (11,), generator=generator) for _ in range(3)]
    for place, ids in zip((0, 4, 10), prompts, strict=True):
        ids[place] = audio_id
    heard = [released.hear(m)[1].argmax(-1) for m in mel]
    assert all(len(tokens.unique()) > 3 for tokens in heard)
    expected = [released.logits(ids, m) for ids, m in zip(prompts, mel, strict=True)]
    ids = torch.randint(0, 250, (3, 14), generator=generator)
    ids[:, 2] = audio_id
    labels = ids.clone()
    labels[:, :6] = -100
    for row, length in enumerate((14, 11, 9)):
        ids[row, length:], labels[row, length:] = pad, -100
    targets = torch.randint(0, 250, (3, 8), generator=generator)
    targets[1, 5:] = -100
    ce, ctc = released.losses(ids, labels, mel, targets)
    compare(model, mel, prompts, heard, expected, (ids, labels, targets, ce, ce + 0.3 * ctc), pad)

    assert convert(["--to-official", str(tmp_path / "ours"), "--out", str(tmp_path / "again")]) == 0
    first, again = (load_file(tmp_path / name / "model.safetensors") for name in ("released", "again"))
    assert first.keys() == again.keys() and all(torch.equal(first[n], again[n]) for n in first)
    written = json.loads((tmp_path / "again" / "config.json").read_text())
    assert all(
        written.get(key) == value for key, value in config.items() if key not in ("transformers_version",)
    )


PROMPT_LENGTHS, TRAINED = (12, 12, 12), (20, 17, 14)  # of the oracle's prompts and training rows


def write_oracle(folder: Path) -> None:
    """A checkpoint and expected.safetensors in the layout of the authors' answers, by the plain
    implementation of the authors' network.

    test_authors_own_answers holds that implementation against the authors' code where SOUNDWAVE_ORACLE names
    its answers.
    """
    words = release_tokenizer(("<padding>", "<audio_patch>"), pad="<padding>")
    config, encoder = released_configs(words, width=48, encoder_width=32, mels=128)
    released = write_release(folder, words, config, encoder, seed=5)
    generator = torch.Generator().manual_seed(6)
    mel, pad, audio = spoken(128, generator), config["llm_pad_token_id"], config["audio_patch_token"]
    answers = {"mel": mel}
    for i, length in enumerate(PROMPT_LENGTHS):
        ids = torch.randint(0, 250, (length,), generator=generator)
        ids[3 + i] = audio
        answers |= {
            f"eval{i}_input_ids": ids[None],
            f"eval{i}_ctc_tokens": released.hear(mel[i])[1].argmax(-1),
            f"eval{i}_logits": released.logits(ids, mel[i])[None],
        }
    ids = torch.randint(0, 250, (3, max(TRAINED)), generator=generator)
    ids[:, 4] = audio
    labels = ids.clone()
    labels[:, :9] = -100
    targets = torch.randint(0, 250, (3, 12), generator=generator)
    for row, length in enumerate(TRAINED):
        ids[row, length:], labels[row, length:], targets[row, 12 - 2 * row :] = pad, -100, -100
    ce, ctc = released.losses(ids, labels, mel, targets)
    save_file(
        {
            **answers,
            "train_input_ids": ids,
            "train_labels": labels,
            "train_asr_targets": targets,
            "train_ce": ce[None],
            "train_loss": (ce + 0.3 * ctc)[None],
        },
        folder / "expected.safetensors",
    )


def check_answers(oracle: Path, folder: Path) -> None:
    """Our model gives the answers of expected.safetensors, and what it exports again is model.safetensors to
    the last bit."""
    expected = load_file(oracle / "expected.safetensors")
    theirs = json.loads((oracle / "config.json").read_text())
    words = tiny.tokenizer("llama3")
    filler = [f"<filler{i}>" for i in range(theirs["llm_pad_token_id"] - len(words))]
    words = release_tokenizer((*filler, "<padding>", "<audio_patch>"), pad="<padding>")
    assert words.convert_tokens_to_ids("<audio_patch>") == theirs["audio_patch_token"]
    for file in ("model.safetensors", "config.json", "encoder/config.json"):
        (folder / "released" / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / "released" / file).write_bytes((oracle / file).read_bytes())
    words.save_pretrained(folder / "released")
    assert convert(["--from-official", str(folder / "released"), "--out", str(folder / "ours")]) == 0
    model = artifact.load(folder / "ours")
    training = (
        expected["train_input_ids"],
        expected["train_labels"],
        expected["train_asr_targets"],
        expected["train_ce"][0],
        expected["train_loss"][0],
    )
    compare(
        model,
        expected["mel"],
        [expected[f"eval{i}_input_ids"][0] for i in range(3)],
        [expected[f"eval{i}_ctc_tokens"] for i in range(3)],
        [expected[f"eval{i}_logits"][0] for i in range(3)],
        training,
        theirs["llm_pad_token_id"],
    )
    assert convert(["--to-official", str(folder / "ours"), "--out", str(folder / "again")]) == 0
    first, again = load_file(oracle / "model.safetensors"), load_file(folder / "again" / "model.safetensors")
    assert first.keys() == again.keys() and all(torch.equal(first[n], again[n]) for n in first)


@torch.no_grad()
def test_answers_in_the_oracles_layout(tmp_path):
    write_oracle(tmp_path / "oracle")
    check_answers(tmp_path / "oracle", tmp_path)


if "SOUNDWAVE_ORACLE" in os.environ:

    @torch.no_grad()
    def test_authors_own_answers(tmp_path):
        """expected.safetensors and its checkpoint, as the authors' code wrote them: our model gives their
        answers, and so does the plain implementation that the other tests compare with."""
        oracle = Path(os.environ["SOUNDWAVE_ORACLE"])
        check_answers(oracle, tmp_path)
        expected, released = load_file(oracle / "expected.safetensors"), ReleasedSoundwave.load(oracle)
        for i, mel in enumerate(expected["mel"]):
            assert torch.equal(released.hear(mel)[1].argmax(-1), expected[f"eval{i}_ctc_tokens"])
            logits = released.logits(expected[f"eval{i}_input_ids"][0], mel)
            assert (logits - expected[f"eval{i}_logits"][0]).abs().max() < 1e-4
        ce, ctc = released.losses(
            expected["train_input_ids"],
            expected["train_labels"],
            expected["mel"],
            expected["train_asr_targets"],
        )
        torch.testing.assert_close(ce, expected["train_ce"][0], rtol=1e-4, atol=0)
        torch.testing.assert_close(ce + 0.3 * ctc, expected["train_loss"][0], rtol=1e-4, atol=0)


def release_like(folders, **llm_options):
    """A model of our own, with LoRA and a tied head, with options that the official layout can
    express."""
    config = official_switches(tiny.config(folders("whisper"), folders("llama", **llm_options)))
    config.alignment.ctc_head = "tied"
    torch.manual_seed(2)
    model = Soundwave.build(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or name.startswith("shrinking.out") or name == "ctc_head.blank_row":
                parameter.normal_(0, 0.2)
    return model


@torch.no_grad()
def expected_answers(model, folder: Path) -> None:
    """Inputs and our logits, for check_release_layout."""
    mel = spoken(16, torch.Generator().manual_seed(4))[1]
    ids, _ = chat_ids(model.tokenizer, [{"role": "user", "content": "<audio_patch>\nWhat?"}], "release")
    batch = release_batch(model, mel[None], torch.tensor([ids]))
    audio = model.encode_audio(batch)
    assert int(audio.kept_lengths) > 3
    embeddings, mask, _ = model.embeddings(batch, audio)
    save_file(
        {
            "input_ids": torch.tensor(ids),
            "mel": mel,
            "text_ids": torch.tensor(model.tokenizer(TEXT).input_ids),
            "logits": model.llm(inputs_embeds=embeddings, attention_mask=mask).logits[0],
        },
        folder / "expected.safetensors",
    )


@torch.no_grad()
def test_our_own_training_in_the_releases_layout(folders, tmp_path):
    """LoRA merged, the tied head written out, tables grown for <audio_patch> and padding."""
    model = release_like(folders)
    artifact.save(model, tmp_path / "run")
    assert convert(["--to-official", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    expected_answers(model, tmp_path / "out")
    expected = load_file(tmp_path / "out" / "expected.safetensors")
    (tmp_path / "out" / "expected.safetensors").unlink()
    released = ReleasedSoundwave.load(tmp_path / "out")
    assert released.config["vocab_size"] == model.audio_id + 2  # the padding token is the last one
    logits = released.logits(expected["input_ids"], expected["mel"])[:, : expected["logits"].shape[1]]
    assert (logits - expected["logits"]).abs().max() < 1e-4
    # and in again: our folder of it gives the same
    assert convert(["--from-official", str(tmp_path / "out"), "--out", str(tmp_path / "back")]) == 0
    back = artifact.load(tmp_path / "back")
    batch = release_batch(back, expected["mel"][None], expected["input_ids"][None])
    embeddings, mask, _ = back.embeddings(batch, back.encode_audio(batch))
    again = back.llm(inputs_embeds=embeddings, attention_mask=mask).logits[0][
        :, : expected["logits"].shape[1]
    ]
    assert (again - expected["logits"]).abs().max() < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("choice", [{"encoder": "last_1"}, {"encoder": "lora"}, {"encoder": "all"}])
def test_a_trained_encoder_is_in_the_releases_layout(folders, choice, tmp_path):
    """Its merged weights, each under the name in the official checkpoint, and those that were not trained as they were."""
    config = official_switches(tiny.config(folders("whisper"), folders("llama")))
    config.encoder.lora_r = 2 if choice["encoder"] == "lora" else 0
    model = Soundwave.build(config)
    model.set_stage(chosen(STAGES["shrinking"], choice))
    for parameter in model.encoder.parameters():
        if parameter.requires_grad:
            parameter.add_(0.1 * torch.randn_like(parameter))
    artifact.save(model, tmp_path / "run")
    assert convert(["--to-official", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    written = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        written |= load_file(file)
    prefix = "model.audio_tower."
    found = {name.removeprefix(prefix): value for name, value in written.items() if name.startswith(prefix)}
    base = load_file(Path(folders("whisper")) / "model.safetensors")
    before = {name.split("encoder.", 1)[1]: value for name, value in base.items() if "encoder." in name}
    before = {name: value for name, value in before.items() if "decoder" not in name}
    assert {name.rpartition("encoder.")[2] for name in found} >= before.keys()
    network = model.encoder.layers
    for module in network.modules():
        if isinstance(module, LoraLayer):
            module.merge()
    expected = {
        name.replace(".base_layer.", "."): value
        for name, value in network.state_dict().items()
        if "lora_" not in name
    }
    changed = 0
    for name, value in found.items():
        key = name.rpartition("encoder.")[2]
        torch.testing.assert_close(value, expected[key], rtol=1e-6, atol=1e-7)
        changed += not torch.equal(value, before[key])
    assert changed >= 4
    constants = 1  # embed_positions is never trained
    assert (changed == len(found) - constants) == (choice["encoder"] == "all")


def test_what_the_layout_cannot_express_is_one_line(folders, tmp_path, capsys):
    build = tiny.config(folders("whisper"), folders("llama"))
    artifact.save(Soundwave.build(build), tmp_path / "ours")
    stage_one = Soundwave.build(build, parts=("encoder", "adapters"))
    artifact.save(stage_one, tmp_path / "one")
    artifact.save(
        Soundwave.build(official_switches(tiny.config(folders("whisper"), folders("qwen2")))),
        tmp_path / "qwen",
    )
    for name, part, key, value in (
        ("short", "alignment", "ctc_length", "true"),
        ("chat", None, "prompt", "chat"),
        ("system", None, "system_prompt", "Listen."),
    ):
        theirs = official_switches(tiny.config(folders("whisper"), folders("llama")))
        setattr(getattr(theirs, part) if part else theirs, key, value)
        artifact.save(Soundwave.build(theirs), tmp_path / name)
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange" / "config.json").write_text("{}")
    for arguments, message in (
        (
            ["--to-official", tmp_path / "ours"],
            "model.alignment.attention = time, the authors' code knows frame only",
        ),
        (
            ["--to-official", tmp_path / "short"],
            "model.alignment.ctc_length = true, the authors' code knows full only",
        ),
        (["--to-official", tmp_path / "chat"], "model.prompt = chat, the authors' code knows release only"),
        (
            ["--to-official", tmp_path / "system"],
            "model.system_prompt = Listen., the authors' code knows None only",
        ),
        (["--to-official", tmp_path / "one"], "stage 1 folder"),
        (["--to-official", tmp_path / "qwen"], "takes Llama only"),
        (["--from-official", tmp_path / "strange"], "has no tokenizer that loads"),
    ):
        assert convert([*map(str, arguments), "--out", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: ") and message in error


@torch.no_grad()
def test_shards_of_any_size(folders, tmp_path, monkeypatch):
    """A checkpoint in many files in, many files out; no shard is larger than asked for."""
    monkeypatch.setattr("model.official.SHARD_BYTES", 40_000)
    words = release_tokenizer()
    config, encoder = released_configs(words)
    released = write_release(tmp_path / "released", words, config, encoder)
    writer = ShardWriter(tmp_path / "released", 30_000)
    for name, tensor in released.state_dict().items():
        writer.add(name, tensor)
    (tmp_path / "released" / "model.safetensors").unlink()
    writer.close()
    assert convert(["--from-official", str(tmp_path / "released"), "--out", str(tmp_path / "ours")]) == 0
    assert convert(["--to-official", str(tmp_path / "ours"), "--out", str(tmp_path / "again")]) == 0
    for folder in (tmp_path / "ours" / "llm", tmp_path / "again"):
        shards = [load_file(f) for f in folder.glob("model-*.safetensors")]
        assert len(shards) > 2 and all(
            len(s) == 1 or sum(t.nbytes for t in s.values()) <= 40_000 for s in shards
        )
    again = ReleasedSoundwave.load(tmp_path / "again").state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in released.state_dict().items())


@pytest.mark.slow
@pytest.mark.long  # installs another transformers
def test_transformers_4_43_takes_the_folder(folders, tmp_path):
    model = release_like(folders, extra_tokens=("<audio_patch>",))
    artifact.save(model, tmp_path / "run")
    assert convert(["--to-official", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    expected_answers(model, tmp_path / "out")
    assert check_release_layout([str(tmp_path / "out")]) == 0
