"""The identity of the frozen base: what changes the numbers is noticed, and nothing else; incomplete and
quantised folders."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path

import pytest
import torch
from transformers import Wav2Vec2Config, Wav2Vec2Model, WhisperFeatureExtractor

from model import artifact, identity
from model.artifact import FolderError
from model.config import EncoderConfig, SoundwaveConfig
from model.encoder import build_encoder
from model.export import export
from model.language_model import load_tokenizer
from model.pretrained import SourceError, fingerprint, locate, read_tensor, tensor_files
from model.soundwave import Soundwave
from stream.cache import check_encoder
from tests.model import tiny


@pytest.fixture
def base(folders, tmp_path):
    """Folders of a Whisper and an LLM of their own."""
    for name, source in (("whisper", folders("whisper")), ("llm", folders("llama_tied"))):
        shutil.copytree(source, tmp_path / name)
    return tmp_path


def found(base: Path, encoder: str = "whisper", llm: str = "llm") -> dict:
    sources = {"encoder": locate(str(base / encoder)), "llm": locate(str(base / llm))}
    return identity.settings(sources, load_tokenizer(sources["llm"], "<audio_patch>"))


def rewrite(path: Path, change) -> None:
    """change: of the JSON object in place, or of the text where it is no JSON."""
    if path.suffix == ".jinja":
        path.write_text(change(path.read_text()))
        return
    content = json.loads(path.read_text()) if path.exists() else {}
    changed = change(content)
    path.write_text(json.dumps(changed if isinstance(changed, dict) else content))


CHANGES = [
    (
        "llm/config.json",
        lambda c: c.update(rms_norm_eps=0.5),
        "llm",
        "config.json rms_norm_eps: 1e-06 -> 0.5",
    ),
    (
        "llm/config.json",
        lambda c: c["rope_parameters"].update(rope_theta=50.0),
        "llm",
        "config.json rope_parameters.rope_theta: 10000.0 -> 50.0",
    ),
    (
        "llm/config.json",
        lambda c: c["rope_parameters"].update(rope_type="linear", factor=2.0),
        "llm",
        "config.json rope_parameters.factor: None -> 2.0",
    ),
    ("llm/config.json", lambda c: c.update(hidden_act="gelu"), "llm", "config.json hidden_act: silu -> gelu"),
    (
        "llm/config.json",
        lambda c: c.update(sliding_window=16),
        "llm",
        "config.json sliding_window: None -> 16",
    ),
    (
        "llm/config.json",
        lambda c: c.update(final_logit_softcapping=30.0),
        "llm",
        "final_logit_softcapping: None -> 30.0",
    ),
    ("llm/config.json", lambda c: c.pop("rms_norm_eps"), None, ""),  # 1e-6 is the default
    (
        "llm/generation_config.json",
        lambda c: c.update(eos_token_id=[263, 5]),
        "llm",
        "eos_token_id: [263] -> [5, 263]",
    ),
    (
        "llm/generation_config.json",
        lambda c: c.update(pad_token_id=7),
        "llm",
        "generation pad_token_id: None -> 7",
    ),
    (
        "llm/chat_template.jinja",
        lambda t: t.replace("<|im_end|>", "<|im_end|> "),
        "tokenizer",
        "chat template: ",
    ),
    (
        "llm/tokenizer_config.json",
        lambda c: c.update(eos_token="<|im_start|>"),
        "tokenizer",
        "eos_token: <|im_end|> -> <|im_start|>",
    ),
    ("llm/tokenizer.json", lambda c: c["model"]["merges"].pop(), "tokenizer", "vocabulary: "),
    (
        "whisper/config.json",
        lambda c: c.update(activation_function="relu"),
        "encoder",
        "activation_function: gelu -> relu",
    ),
    (
        "whisper/config.json",
        lambda c: c.update(scale_embedding=True),
        "encoder",
        "scale_embedding: False -> True",
    ),
    (
        "whisper/preprocessor_config.json",
        lambda c: c.update(hop_length=320),
        "encoder",
        "preprocessor_config.json hop_length: 160 -> 320",
    ),
    (
        "whisper/preprocessor_config.json",
        lambda c: c.update(sampling_rate=8000),
        "encoder",
        "sampling_rate: 16000 -> 8000",
    ),
    # What changes nothing.
    ("llm/config.json", lambda c: dict(reversed(c.items())), None, ""),
    (
        "llm/config.json",
        lambda c: c.update(_name_or_path="elsewhere", transformers_version="4.1.0", dtype="bfloat16"),
        None,
        "",
    ),
    (
        "llm/config.json",
        lambda c: c.update(torch_dtype="float16", architectures=["X"], use_cache=False),
        None,
        "",
    ),
    (
        "llm/config.json",
        lambda c: c.update(attention_dropout=0.5, initializer_range=1.0, output_attentions=True),
        None,
        "",
    ),
    ("llm/config.json", lambda c: c["rope_parameters"].update(rope_theta=10000), None, ""),  # not 10000.0
    (
        "llm/config.json",
        lambda c: [c.pop("rope_parameters"), c.update(rope_theta=10000.0)],
        None,
        "",
    ),  # transformers 4's
    (
        "llm/generation_config.json",
        lambda c: c.update(eos_token_id=[263], temperature=0.3, transformers_version="4"),
        None,
        "",
    ),
    (
        "whisper/config.json",
        lambda c: c.update(decoder_layers=9, suppress_tokens=[1], vocab_size=7, dropout=0.2),
        None,
        "",
    ),
    (
        "whisper/preprocessor_config.json",
        lambda c: WhisperFeatureExtractor(feature_size=16).to_dict(),
        None,
        "",
    ),
]


@pytest.mark.parametrize("file, change, part, words", CHANGES, ids=range(len(CHANGES)))
def test_what_changes_the_numbers_is_named_and_nothing_else(base, file, change, part, words):
    before = found(base)
    rewrite(base / file, change)
    changes = identity.changes(before, found(base))
    if part is None:
        assert changes == {}
    else:
        assert list(changes) == [part] and any(words in line for line in changes[part]), changes


def test_white_space_of_json_makes_no_difference(base):
    before = found(base)
    for name in (
        "llm/config.json",
        "llm/tokenizer.json",
        "llm/tokenizer_config.json",
        "llm/generation_config.json",
        "whisper/config.json",
    ):
        path = base / name
        path.write_text(json.dumps(json.loads(path.read_text()), indent=7))
    assert identity.changes(before, found(base)) == {}


def test_a_name_that_another_version_does_not_know_is_no_difference(base):
    stored = found(base)
    stored["llm"]["config.json gone_since"] = 3
    assert "llm" in identity.changes(stored, found(base))
    stored["transformers"] = "4.0.0"
    assert identity.changes(stored, found(base)) == {}
    stored["llm"]["config.json rms_norm_eps"] = 1.0
    assert identity.changes(stored, found(base))["llm"] == ["config.json rms_norm_eps: 1.0 -> 1e-06"]


def test_the_normalisation_of_waveforms_belongs_to_their_encoder(base, tmp_path):
    folder = tmp_path / "wav2vec2"
    Wav2Vec2Model(
        Wav2Vec2Config(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            conv_dim=(8,),
            conv_stride=(4,),
            conv_kernel=(8,),
            num_feat_extract_layers=1,
            num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2,
        )
    ).save_pretrained(folder)
    before = found(base, "wav2vec2")
    (folder / "preprocessor_config.json").write_text('{"do_normalize": true, "sampling_rate": 16000}')
    assert identity.changes(before, found(base, "wav2vec2")) == {}
    # Where newer processors keep it.
    (folder / "preprocessor_config.json").unlink()
    (folder / "processor_config.json").write_text('{"feature_extractor": {"do_normalize": false}}')
    assert identity.changes(before, found(base, "wav2vec2")) == {
        "encoder": ["preprocessor_config.json do_normalize: True -> False"]
    }
    encoder = build_encoder(EncoderConfig(str(folder)), locate(str(folder)), torch.float32, None)
    assert encoder.normalise is False, "and the encoder reads it there"


# ------------------------------------------------------------------------------------------------------ model


def run_of(base: Path, tmp_path: Path) -> Path:
    torch.manual_seed(1)
    made = Soundwave.build(tiny.config(str(base / "whisper"), str(base / "llm"))).eval()
    return artifact.save(made, tmp_path / "run" / "model", {"recipe": {"data": {}}, "step": 1})


@pytest.mark.parametrize(
    "file, change, words",
    [
        (
            "llm/config.json",
            lambda c: c.update(rms_norm_eps=0.5),
            "another llm (config.json rms_norm_eps: 1e-06 -> 0.5)",
        ),
        ("llm/chat_template.jinja", lambda t: t + " ", "trained with another tokenizer (chat template: "),
        (
            "llm/generation_config.json",
            lambda c: c.update(eos_token_id=1),
            "generation eos_token_id: [263] -> [1]",
        ),
        (
            "whisper/config.json",
            lambda c: c.update(activation_function="relu"),
            "another encoder (config.json activation_function: ",
        ),
    ],
)
def test_a_changed_base_is_refused_by_loading_the_next_stage_and_export(base, tmp_path, file, change, words):
    folder = run_of(base, tmp_path)
    artifact.load(folder)
    rewrite(base / file, change)
    second = Soundwave.build(tiny.config(str(base / "whisper"), str(base / "llm")))
    for refuse in (
        lambda: artifact.load(folder),
        lambda: artifact.load_trained(second, folder),
        lambda: export(folder, tmp_path / "out"),
        lambda: export(folder, tmp_path / "merged", merge=True),
    ):
        with pytest.raises(FolderError) as raised:
            refuse()
        assert (
            words in str(raised.value) and str(folder) in str(raised.value) and "\n" not in str(raised.value)
        )
    assert artifact.load(folder, verify=False).llm is not None
    assert set(artifact.base_differences(second, folder)) == {"tokenizer" if "template" in file else "base"}


def test_folders_made_before_settings_were_recorded_load_with_one_line(base, tmp_path, caplog):
    folder = run_of(base, tmp_path)
    description = json.loads((folder / "soundwave.json").read_text())
    del description["settings"]
    (folder / "soundwave.json").write_text(json.dumps(description))
    rewrite(base / "llm/config.json", lambda c: c.update(rms_norm_eps=0.5))
    logging.getLogger("soundwave").propagate = True
    artifact.load(folder)
    assert [record.message for record in caplog.records if str(folder) in record.message] == [
        f"{folder} does not record the configurations, the preprocessor, the tokenizer and the end tokens of "
        f"its frozen parts "
        "(an earlier version made it): only their tensors were compared"
    ]


@pytest.mark.parametrize("merge", [False, True])
def test_an_export_records_what_is_in_it(base, tmp_path, merge):
    out = export(run_of(base, tmp_path), tmp_path / "out", merge=merge, with_encoder=True)
    artifact.load(out)
    place = out / "llm" if merge else base / "llm"
    rewrite(place / "config.json", lambda c: c.update(rms_norm_eps=0.5))
    with pytest.raises(FolderError, match="another llm"):
        artifact.load(out)


def test_cached_features_belong_to_the_encoders_configuration(base, tmp_path):
    config = SoundwaveConfig(encoder=EncoderConfig(str(base / "whisper")))
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "settings.json").write_text(
        json.dumps({"identity": identity.encoder_settings(locate(str(base / "whisper")))})
    )
    check_encoder(cache, config)
    rewrite(base / "whisper/config.json", lambda c: c.update(activation_function="relu"))
    with pytest.raises(
        ValueError, match="another configuration of this encoder gave .*activation_function: gelu -> relu"
    ):
        check_encoder(cache, config)
    (cache / "settings.json").write_text("{}")  # made before this was recorded
    check_encoder(cache, config)


# --------------------------------------------------------------------------------------- folders that cannot


@pytest.mark.parametrize(
    "method",
    [
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {"load_in_8bit": True},
        {"quant_method": "mxfp4"},
        {"quant_method": "gptq", "bits": 4},
    ],
)
@pytest.mark.parametrize("part", ["llm", "whisper"])
def test_quantised_models_are_refused_wherever_they_are_found(base, part, method):
    rewrite(base / part / "config.json", lambda c: c.update(quantization_config=method))
    for sizes_only in (True, False):
        with pytest.raises(SourceError, match="is quantised") as raised:
            locate(str(base / part), sizes_only=sizes_only)
        assert str(method.get("quant_method", "load_in_8bit")) in str(raised.value) and "\n" not in str(
            raised.value
        )
    with pytest.raises(SourceError, match="is quantised"):
        Soundwave.build(
            tiny.config(str(base / "whisper"), str(base / "llm")), parts=("encoder", "adapters")
        )  # stage 1
    rewrite(base / part / "config.json", lambda c: c.update(quantization_config=None))
    locate(str(base / part))


def sharded(base: Path) -> tuple[Path, list[Path]]:
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(base / "llm").save_pretrained(base / "cut", max_shard_size="20KB")
    for path in (base / "llm").iterdir():
        if path.name.startswith(("tok", "chat")):
            shutil.copyfile(path, base / "cut" / path.name)
    files = sorted((base / "cut").glob("*.safetensors"))
    assert len(files) > 2
    return base / "cut", files


@pytest.mark.parametrize(
    "spoil, words",
    [
        (
            lambda files: files[-1].unlink(),
            r"incomplete: model-0.* of model.safetensors.index.json is missing",
        ),
        (lambda files: [file.unlink() for file in files[1:]], r"incomplete: model-0.* and \d+ more of model"),
        (lambda files: os.truncate(files[0], 300), "damaged or cut short"),
        (lambda files: files[0].write_bytes(b"no tensors"), "damaged or cut short"),
        (lambda files: shutil.copyfile(files[0], files[1]), "does not hold '"),
        (
            lambda files: (files[0].parent / "model.safetensors.index.json").write_text("{"),
            "index.json is not valid JSON",
        ),
        (
            lambda files: (files[0].parent / "model.safetensors.index.json").write_text("{}"),
            "has no weight_map",
        ),
        (lambda files: (files[0].parent / "config.json").write_text("{"), "config.json is not valid JSON"),
        (
            lambda files: (files[0].parent / "config.json").write_text("[]"),
            r"config\.json does .* a JSON object",
        ),
        (
            lambda files: (files[0].parent / "config.json").write_text('{"model_type": "no"}'),
            "has no config.json that can be",
        ),
        (lambda files: (files[0].parent / "tokenizer.json").unlink(), "has no tokenizer that can be loaded"),
        (
            lambda files: rewrite(files[0].parent / "config.json", lambda c: c.update(num_hidden_layers=3)),
            "lacks .* of the tensors",
        ),
        (
            lambda files: rewrite(files[0].parent / "config.json", lambda c: c.update(intermediate_size=63)),
            "do not have the sizes",
        ),
    ],
)
def test_an_incomplete_folder_is_one_line(base, spoil, words):
    folder, files = sharded(base)
    Soundwave.build(tiny.config(str(base / "whisper"), str(folder)))
    spoil(files)
    with pytest.raises(SourceError, match=words) as raised:
        Soundwave.build(tiny.config(str(base / "whisper"), str(folder)))
    assert "\n" not in str(raised.value) and str(folder) in str(raised.value)
    if (
        "safetensors" in words or "cut short" in words or "not hold" in words
    ):  # each reader of tensors says the same
        for reader in (tensor_files, fingerprint, lambda folder: read_tensor(folder, "model.norm.weight")):
            with pytest.raises(SourceError, match=words):
                reader(folder)


def test_a_built_model_gives_the_recorded_identity(base, tmp_path):
    """What preflight, resume and dry run compute from files alone is what the model folder holds, dropout set
    to 0 included."""
    rewrite(base / "llm/config.json", lambda c: c.update(attention_dropout=0.3))
    described = artifact.describe(run_of(base, tmp_path))
    assert described["settings"] == found(base)
