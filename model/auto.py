"""`import model.auto`, and `transformers.AutoModel.from_pretrained(DIR)` gives a Soundwave out of an exported folder."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoConfig, AutoModel, PretrainedConfig

from model import folder
from model.soundwave import Soundwave

_OPTIONS = ("encoder", "llm", "device", "dtype", "verify")


class SoundwaveHubConfig(PretrainedConfig):
    """config.json of an exported folder."""

    model_type = "soundwave"


class SoundwaveAuto:
    """What AutoModel calls; the result is an ordinary `Soundwave` in eval mode."""

    config_class = SoundwaveHubConfig

    @classmethod
    def from_pretrained(cls, name: str | Path, *args, config: PretrainedConfig | None = None, **options) -> Soundwave:
        """name: an exported folder. Options: those of `model.folder.load` (encoder, llm, device, dtype, verify)."""
        return folder.load(name, **{k: v for k, v in options.items() if k in _OPTIONS})


AutoConfig.register(SoundwaveHubConfig.model_type, SoundwaveHubConfig)
AutoModel.register(SoundwaveHubConfig, SoundwaveAuto)
