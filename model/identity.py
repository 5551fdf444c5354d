"""The identity of the frozen parts beside their tensors: what else decides the numbers that they compute.

    settings(sources, tokenizer) ->
        {"transformers": version,
         "encoder":   {"config.json d_model": 512, ..., "preprocessor_config.json hop_length": 160, ...},
         "llm":       {"config.json rms_norm_eps": 1e-05, ..., "generation eos_token_id": [2], ...},
         "tokenizer": {"vocabulary": sha256, "chat template": sha256, "bos_token": "<s>", ...}}

Model folders and checkpoints record it beside the tensors' hashes. Files are read as transformers reads them:
order, white space, names of earlier versions and defaults that are written out make no difference.
"""

from __future__ import annotations

import hashlib
import json
import re

import transformers
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from model.pretrained import Source, preprocessor_settings, read_json

PARTS = ("encoder", "llm", "tokenizer")
# Of a config.json: provenance, the type of the weights (the recipe decides it), what only training or
# classification heads use, and token ids, of which generation_config.json's count.
_NO_MATTER = re.compile(
    r"_name_or_path|transformers_version|dtype|torch_dtype|architectures|auto_map|_commit_hash|use_cache"
    r"|_?attn_implementation.*|output_\w+|return_dict|id2label|label2id|problem_type|initializer_\w+|init_std|pretraining_tp"
    r"|\w*(dropout|pdrop|layerdrop)\w*|(bos|eos|pad|sep|decoder_start)_token_id|chunk_size_feed_forward|torchscript|tokenizer_class"
)
# Of an encoder's: what belongs to the decoder and to other tasks.
_NOT_ENCODERS = re.compile(
    r"decoder_\w+|max_target_positions|vocab_size|(begin_)?suppress_tokens|forced_decoder_ids|is_encoder_decoder|max_length|"
    r"median_filter_width|use_weighted_layer_sum|classifier_proj_size|apply_spec_augment|mask_\w+|ctc_\w+|tie_word_embeddings|"
    r"tdnn_\w+|xvector_\w+|num_codevector\w*|codevector_dim|contrastive_\w+|num_negatives|proj_codevector_dim|diversity_\w+"
)
_PREPROCESSOR = {
    "sampling_rate": 16000,
    "hop_length": None,
    "n_fft": None,
    "feature_size": None,
    "do_normalize": None,
    "padding_value": 0.0,
    "dither": 0.0,
}


def settings(sources: dict[str, Source], tokenizer: PreTrainedTokenizerBase) -> dict[str, object]:
    """Return the identity beside the tensors (see the module's docstring), as JSON gives it back. The sources
    have folders."""
    llm = sources["llm"]
    values = {"llm": _config(llm.config) | _end_tokens(llm), "tokenizer": _tokenizer(tokenizer)}
    return encoder_settings(sources["encoder"]) | json.loads(json.dumps(values, default=str))


def encoder_settings(encoder: Source) -> dict[str, object]:
    """Return the encoder's part of `settings` alone."""
    values = {
        "transformers": transformers.__version__,
        "encoder": _config(encoder.config, _NOT_ENCODERS) | _preprocessor(encoder),
    }
    return json.loads(json.dumps(values, default=str))


def changes(stored: dict, now: dict) -> dict[str, list[str]]:
    """Return part -> "name: then -> now" lines, for the parts that differ.

    A name that one side lacks counts as a difference under the same version of transformers; other versions
    know other names.
    """
    same_version = stored.get("transformers") == now.get("transformers")
    changed = {}
    for part in PARTS:
        then, here = stored.get(part, {}), now.get(part, {})
        names = sorted(then.keys() | here.keys() if same_version else then.keys() & here.keys())
        lines = [line for name in names for line in _lines(name, then.get(name), here.get(name))]
        if lines:
            changed[part] = lines
    return changed


def vocabulary_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the sha256 (hex) of how text becomes ids: normalisation, splitting, vocabulary, added tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    return _sha256(text)


def _lines(name: str, then: object, now: object) -> list[str]:
    if then == now:
        return []
    if isinstance(then, dict) and isinstance(now, dict):
        return [
            line
            for key in sorted(then.keys() | now.keys())
            for line in _lines(f"{name}.{key}", then.get(key), now.get(key))
        ]
    return [f"{name}: {_short(then)} -> {_short(now)}"]


def _short(value: object) -> str:
    if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value):
        return f"{value[:12]}..."
    text = str(value)
    return text if len(text) <= 60 else text[:56] + " ..."


def _config(config: PretrainedConfig, also_no_matter: re.Pattern | None = None) -> dict[str, object]:
    return {
        f"config.json {key}": value
        for key, value in _values_that_matter(config.to_dict()).items()
        if also_no_matter is None or not also_no_matter.fullmatch(key)
    }


def _values_that_matter(values: dict) -> dict:
    """A config's values that matter, its sub-configs' too."""
    return {
        str(key): _values_that_matter(value) if isinstance(value, dict) else value
        for key, value in values.items()
        if not _NO_MATTER.fullmatch(str(key))
    }


def _preprocessor(source: Source) -> dict[str, object]:
    """Values of the feature extractor that change features; where a file or a value is missing, those that
    the family has."""
    own = {
        "feature_size": getattr(source.config, "num_mel_bins", 1),
        "do_normalize": source.config.model_type != "whisper",
    }
    if source.config.model_type == "whisper":
        own |= {"hop_length": 160, "n_fft": 400}
    given = preprocessor_settings(source.folder)
    return {
        f"preprocessor_config.json {key}": given.get(key, own.get(key, default))
        for key, default in _PREPROCESSOR.items()
    }


def _end_tokens(source: Source) -> dict[str, object]:
    """Ids that end an answer and pad a batch, of generation_config.json, or of config.json where that is
    missing."""
    path = source.files / "generation_config.json"
    values = read_json(path) if path.exists() else source.config.to_dict()
    ends = values.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [ends]
    return {
        "generation eos_token_id": sorted(one for one in ends if one is not None),
        "generation pad_token_id": values.get("pad_token_id"),
    }


def _tokenizer(tokenizer: PreTrainedTokenizerBase) -> dict[str, object]:
    template = tokenizer.chat_template
    return {
        "vocabulary": vocabulary_hash(tokenizer),
        "chat template": None if template is None else _sha256(json.dumps(template, sort_keys=True)),
        **{
            name: str(value) if (value := getattr(tokenizer, name)) is not None else None
            for name in ("bos_token", "eos_token", "pad_token")
        },
    }


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
