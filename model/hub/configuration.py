"""Configuration of a Soundwave speech LLM for transformers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from transformers import AutoConfig, PretrainedConfig


class SoundwaveHubConfig(PretrainedConfig):
    """config.json. soundwave: the method's options (SoundwaveConfig of the training system), of which the
    properties give the sections; encoder_config and llm_config: those of the two networks."""

    model_type = "soundwave_llm"
    sub_configs = {"encoder_config": AutoConfig, "llm_config": AutoConfig}

    def __init__(
        self,
        soundwave: dict | None = None,
        encoder_config: dict | PretrainedConfig | None = None,
        llm_config: dict | PretrainedConfig | None = None,
        ctc_rows: int = 0,
        audio_token_id: int = 0,
        normalise_waveforms: bool = True,
        **options,
    ):
        """ctc_rows: of the CTC head's weight; audio_token_id: of the audio's place in a prompt;
        normalise_waveforms: of encoders that read waveforms."""
        self.soundwave = soundwave or {}
        self.encoder_config = _config_of(encoder_config, "whisper")
        self.llm_config = _config_of(llm_config, "llama")
        self.ctc_rows, self.audio_token_id = ctc_rows, audio_token_id
        self.normalise_waveforms = normalise_waveforms
        super().__init__(**options)

    @property
    def alignment(self) -> Any:
        return SimpleNamespace(**self.soundwave["alignment"])

    @property
    def shrinking(self) -> Any:
        return SimpleNamespace(**self.soundwave["shrinking"])

    @property
    def compressor(self) -> str:
        """The compressor's name; recipes without one say `shrinking.enabled: false` for all frames."""
        name = self.soundwave.get("compressor", "ctc_peaks")
        return "all_frames" if name == "ctc_peaks" and not self.shrinking.enabled else name

    @property
    def compressor_options(self) -> dict[str, float]:
        return self.soundwave.get("compressor_options", {})

    @property
    def audio_token(self) -> str:
        return self.soundwave["audio_token"]

    def get_text_config(self, decoder=None, encoder=None):
        return self.llm_config.get_text_config()


def _config_of(given: dict | PretrainedConfig | None, default: str) -> PretrainedConfig:
    if isinstance(given, PretrainedConfig):
        return given
    return AutoConfig.for_model(**({"model_type": default} | (given or {})))
