"""`import model.auto`, and `transformers.AutoModel.from_pretrained(DIR)` gives a Soundwave out of an exported
folder."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
from transformers import AutoConfig, AutoModel, PretrainedConfig

from core.near_names import did_you_mean, near_names
from model import artifact
from model.soundwave import Soundwave

_OPTIONS = ("encoder", "llm", "device", "device_map", "dtype", "torch_dtype", "attn_implementation", "verify")
# What transformers and its users hand to every model and what changes nothing for a folder on disk.
_WITHOUT_EFFECT = {
    "_from_auto",
    "adapter_kwargs",
    "cache_dir",
    "code_revision",
    "force_download",
    "local_files_only",
    "low_cpu_mem_usage",
    "proxies",
    "token",
    "trust_remote_code",
    "use_safetensors",
    "weights_only",
}
# Options that ask for nothing with these values, and for something that cannot be had with any other.
_NEUTRAL = {
    "revision": (None, "main"),
    "subfolder": (None, ""),
    "quantization_config": (None,),
    "load_in_8bit": (None, False),
    "load_in_4bit": (None, False),
    "output_loading_info": (None, False),
    "tp_plan": (None,),
    "variant": (None,),
}


class SoundwaveHubConfig(PretrainedConfig):
    """config.json of an exported folder."""

    model_type = "soundwave"


class SoundwaveAuto:
    """What AutoModel calls; the result is an ordinary `Soundwave` in eval mode."""

    config_class = SoundwaveHubConfig

    @classmethod
    def from_pretrained(
        cls, name: str | Path, *args, config: PretrainedConfig | None = None, **options
    ) -> Soundwave:
        """Load an exported folder.

        Options: those of `model.artifact.load` (encoder, llm, device, dtype, verify), and transformers' names
        for them: `torch_dtype`, `device_map` (one device, or "auto": the first GPU where there is one) and
        `attn_implementation`. Errors: TypeError for an option that is not known, ValueError for one that an
        exported folder cannot follow.
        """
        for option, value in options.items():
            if option in _NEUTRAL and value not in _NEUTRAL[option]:
                raise ValueError(
                    f"{option}={value!r}: a Soundwave folder is loaded as it is on disk: leave {option} out"
                )
            if option not in (*_OPTIONS, *_WITHOUT_EFFECT, *_NEUTRAL):
                near = near_names(option, _OPTIONS)
                hint = f"; {did_you_mean(near)}" if near else f": {', '.join(_OPTIONS)} are known"
                raise TypeError(f"unknown option '{option}'{hint}")
        dtypes = {
            artifact.dtype_name(options[key])
            for key in ("dtype", "torch_dtype")
            if options.get(key) is not None
        }
        if len(dtypes) > 1:
            raise ValueError("dtype and torch_dtype ask for different types: give only one")
        device = _device_of(options.get("device_map"))
        if device is not None and options.get("device") is not None:
            raise ValueError("device and device_map are two names for one thing: give only one")
        attention = options.get("attn_implementation") or getattr(
            config, "_attn_implementation_internal", None
        )
        return artifact.load(
            name,
            encoder=options.get("encoder"),
            llm=options.get("llm"),
            device=device or options.get("device"),
            dtype=dtypes.pop() if dtypes else None,
            verify=options.get("verify", True),
            attention=attention,
        )


def _device_of(device_map: object) -> torch.device | None:
    """The one device that a device_map names. Errors: ValueError for a map that spreads the model."""
    if isinstance(device_map, dict) and set(device_map) == {""}:
        device_map = device_map[""]
    if device_map is None or isinstance(device_map, torch.device):
        return device_map
    if device_map == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(cast(str, device_map))  # what is no name or number is a TypeError
    except (RuntimeError, TypeError):
        raise ValueError(
            f'device_map={device_map!r}: a Soundwave is on one device: give its name, e.g. "cuda"'
        ) from None


AutoConfig.register(SoundwaveHubConfig.model_type, SoundwaveHubConfig)
AutoModel.register(SoundwaveHubConfig, SoundwaveAuto)
