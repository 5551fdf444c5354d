"""The audio encoder: waveforms to frames, each clip at its true length.

Another encoder family is one small class here: it says its width, its frame count for a number of samples,
how many seconds it takes at once, and encodes. Nothing else in the project knows which one runs.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    HubertModel,
    ParakeetEncoder,
    PretrainedConfig,
    Wav2Vec2BertModel,
    Wav2Vec2Model,
    WavLMModel,
)
from transformers.masking_utils import create_bidirectional_mask
from transformers.models.whisper.modeling_whisper import WhisperEncoder as TransformersWhisperEncoder

from model.config import EncoderConfig, OptionError
from model.features import HOP, SAMPLE_RATE, log_mel, mel_frames
from model.filter_banks import (
    FFT,
    WINDOW,
    kaldi_banks,
    kaldi_frames,
    nemo_frames,
    nemo_log_mel,
    padded,
)
from model.pretrained import Source, SourceError, preprocessor_settings, reading, tensor_files


class Encoder(nn.Module, ABC):
    """An encoder, always in eval mode. Subclasses set `width`, `frame_rate`, `window_seconds` and implement
    `frames` and `encode`. learns: whether gradients flow into it (model/trained_encoder.py)."""

    learns: bool = False
    layers: Any  # the network
    width: int  # of one frame
    frame_rate: float  # frames per second
    window_seconds: float | None  # seconds encoded at once; null: any length

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.pad_to_samples = (
            None if config.pad_to_seconds is None else round(config.pad_to_seconds * SAMPLE_RATE)
        )
        self.max_seconds = config.max_seconds

    @abstractmethod
    def frames(self, samples: torch.Tensor) -> torch.Tensor:
        """Frames of clips of that many samples, as integers."""

    @abstractmethod
    def input_sizes(self, samples: int) -> tuple[int, ...]:
        """Sizes of one clip of that many samples as the network takes it."""

    @abstractmethod
    def encode(
        self, waveforms: torch.Tensor, lengths: torch.Tensor, mel_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """waveforms [W, S], lengths [W] (samples) -> features [W, T, width]; T covers the longest, or the
        padded length."""

    def forward(
        self,
        waveforms: torch.Tensor,
        lengths: torch.Tensor,
        padded: bool = False,
        mel_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """waveforms [A, S] at 16 kHz, lengths [A] (samples) -> features [A, T, width], lengths [A] (frames).

        Clips beyond the encoder's window are cut into windows, encoded as a batch and put together again.
        `padded`: the lengths count the silence of `pad_to_seconds` too. mel_mask [A, n_mels, F]: for encoders
        that see a mel.
        Errors: ValueError beyond `max_seconds`.
        """
        longest = int(lengths.max())
        if longest > self.max_seconds * SAMPLE_RATE:
            raise ValueError(
                f"audio of {longest / SAMPLE_RATE:.1f} s is longer than model.encoder.max_seconds = "
                f"{self.max_seconds:g}: cut it, or raise that setting"
            )
        with torch.set_grad_enabled(self.learns and torch.is_grad_enabled()):
            return self._frames_of(waveforms, lengths, longest, padded, mel_mask)

    def _frames_of(
        self,
        waveforms: torch.Tensor,
        lengths: torch.Tensor,
        longest: int,
        padded: bool,
        mel_mask: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        window = self.pad_to_samples
        if not window and self.window_seconds:
            window = round(self.window_seconds * SAMPLE_RATE)
        if window is None or longest <= window:
            features = self.encode(waveforms[:, : max(longest, 1)], lengths, mel_mask)
            frames = self.frames(lengths)
        else:
            features, frames = self._encode_windows(waveforms, lengths, window, mel_mask)
        if padded and (full := self.pad_to_samples):
            # each clip to the end of its own last window, whatever else the batch holds
            frames = (-(-lengths // full)).clamp(min=1) * int(self.frames(torch.tensor(full)))
        features = features[:, : int(frames.max())]
        behind = torch.arange(features.shape[1], device=features.device) >= frames[:, None]
        return features.masked_fill(behind[..., None], 0.0), frames

    def _encode_windows(
        self, waveforms: torch.Tensor, lengths: torch.Tensor, window: int, mel_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Each clip's windows stand one behind the other; all but a clip's last one are full, so its frames
        are contiguous."""
        audios = waveforms.shape[0]
        count = -(-int(lengths.max()) // window)
        pieces = F.pad(waveforms, (0, max(0, count * window - waveforms.shape[1])))[
            :, : count * window
        ].reshape(-1, window)
        sizes = (lengths[:, None] - window * torch.arange(count, device=lengths.device)).clamp(0, window)
        used = sizes > 0
        used[:, 0] = True
        if mel_mask is not None:
            length = window // HOP
            mel_mask = F.pad(mel_mask, (0, max(0, count * length - mel_mask.shape[-1])))[
                ..., : count * length
            ]
            mel_mask = mel_mask.unflatten(-1, (count, length)).transpose(1, 2).flatten(0, 1)[used.flatten()]
        encoded = self.encode(pieces[used.flatten()], sizes[used], mel_mask)
        per_window = int(self.frames(torch.tensor(window)))
        features = encoded.new_zeros(audios * count, per_window, self.width)
        features[used.flatten(), : encoded.shape[1]] = encoded
        frames = torch.where(used, self.frames(sizes), 0).sum(1)
        return features.view(audios, count * per_window, self.width), frames


class WhisperLayers(TransformersWhisperEncoder):
    """The encoder out of a whole Whisper: its decoder's weights are passed over without a word."""

    _keys_to_ignore_on_load_unexpected = [r"decoder\.", r"proj_out"]


class WhisperEncoder(Encoder):
    """Whisper's encoder, with a forward of its own: transformers' takes clips of 30 s only."""

    def __init__(self, config: EncoderConfig, layers: WhisperLayers, source: Source):
        super().__init__(config)
        self.layers = layers
        self.width = layers.config.d_model
        self.frame_rate = 50.0
        self.window_seconds = layers.config.max_source_positions / self.frame_rate
        if config.pad_to_seconds is not None and config.pad_to_seconds > self.window_seconds:
            raise OptionError(
                f"model.encoder.pad_to_seconds = {config.pad_to_seconds:g} is beyond this encoder's "
                f"{self.window_seconds:g} s"
            )

    def frames(self, samples: torch.Tensor) -> torch.Tensor:
        return (mel_frames(samples) + 1) // 2

    def input_sizes(self, samples: int) -> tuple[int, ...]:
        return self.layers.config.num_mel_bins, int(mel_frames(torch.tensor(samples)))

    def encode(
        self, waveforms: torch.Tensor, lengths: torch.Tensor, mel_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        mel, frames = log_mel(waveforms, lengths, self.layers.config.num_mel_bins, self.pad_to_samples)
        if mel_mask is not None:
            mel_mask = F.pad(mel_mask[..., : mel.shape[-1]], (0, max(0, mel.shape[-1] - mel_mask.shape[-1])))
            mel = mel.masked_fill(mel_mask, 0.0)
        if self.pad_to_samples:  # as Whisper was trained: it attends over the silence, too
            frames = torch.full_like(frames, mel.shape[-1])
        return self.encode_mel(mel, frames)

    def encode_mel(self, mel: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
        """mel [A, n_mels, F], frames [A] -> features [A, ceil(F / 2), width]. Padding does not affect
        the result: both convolutions see zeros there, as they do at the end of a clip that is alone, and
        attention is masked."""
        net = self.layers
        hidden = mel.to(net.conv1.weight.dtype)
        for convolution, stride in ((net.conv1, 1), (net.conv2, 2)):
            behind = torch.arange(hidden.shape[-1], device=mel.device) >= frames[:, None]
            hidden = F.gelu(convolution(hidden.masked_fill(behind[:, None], 0.0)))
            frames = (frames + stride - 1) // stride
        hidden = hidden.transpose(1, 2)
        # The embedding is called, not indexed: ZeRO-3 gathers a module's weights when the module is called.
        hidden = hidden + net.embed_positions(torch.arange(hidden.shape[1], device=mel.device))
        valid = torch.arange(hidden.shape[1], device=mel.device) < frames[:, None]
        mask = create_bidirectional_mask(net.config, hidden, valid.long())
        for layer in net.layers:
            hidden = layer(hidden, mask)
        return net.layer_norm(hidden)


class ClipNorm(nn.GroupNorm):
    """wav2vec2's norm over a clip's time, taken over the frames that the clip has: `lengths` [A] is set
    before the call."""

    lengths: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [A, C, T] -> [A, C, T]"""
        valid = (torch.arange(x.shape[-1], device=x.device) < self.lengths[:, None])[:, None]
        count = self.lengths[:, None, None].to(x.dtype)
        mean = (x * valid).sum(-1, keepdim=True) / count
        variance = ((x - mean).square() * valid).sum(-1, keepdim=True) / count
        return (x - mean) * (variance + self.eps).rsqrt() * self.weight[:, None] + self.bias[:, None]


class WaveformEncoder(Encoder):
    """wav2vec 2.0, HuBERT and WavLM: convolutions on the waveform (50 frames a second), then Transformer
    layers, any length."""

    window_seconds = None

    def __init__(
        self, config: EncoderConfig, layers: Wav2Vec2Model | HubertModel | WavLMModel, source: Source
    ):
        super().__init__(config)
        self.layers = layers
        sizes = layers.config
        self.width = sizes.hidden_size
        self.convolutions = list(zip(sizes.conv_kernel, sizes.conv_stride, strict=True))
        self.frame_rate = SAMPLE_RATE / math.prod(sizes.conv_stride)
        self.shortest = 1  # samples of the first frame
        for kernel, stride in reversed(self.convolutions):
            self.shortest = (self.shortest - 1) * stride + kernel
        self.normalise = preprocessor_settings(source.folder).get("do_normalize", True)
        for module in layers.feature_extractor.modules():
            if isinstance(
                module, nn.GroupNorm
            ):  # as it is, a clip's padding would move its mean and variance
                module.__class__ = ClipNorm

    def frames(self, samples: torch.Tensor) -> torch.Tensor:
        frames = samples.clamp(min=self.shortest)
        for kernel, stride in self.convolutions:
            frames = (frames - kernel) // stride + 1
        return frames

    def input_sizes(self, samples: int) -> tuple[int, ...]:
        return (max(samples, self.shortest),)

    def encode(
        self, waveforms: torch.Tensor, lengths: torch.Tensor, mel_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        if mel_mask is not None:
            raise ValueError("data.spec_augment masks a mel, which this encoder does not see: switch it off")
        valid = torch.arange(waveforms.shape[1], device=waveforms.device) < lengths[:, None]
        waveforms = waveforms.float().masked_fill(~valid, 0.0)
        if self.normalise:
            mean = waveforms.sum(1, keepdim=True) / lengths[:, None]
            variance = ((waveforms - mean).square() * valid).sum(1, keepdim=True) / lengths[:, None]
            waveforms = ((waveforms - mean) * (variance + 1e-7).rsqrt()).masked_fill(~valid, 0.0)
        longest = max(self.shortest, self.pad_to_samples or waveforms.shape[1])
        waveforms = F.pad(waveforms, (0, longest - waveforms.shape[1]))
        lengths = (
            torch.full_like(lengths, longest) if self.pad_to_samples else lengths.clamp(min=self.shortest)
        )
        kernel, stride = self.convolutions[0]
        for module in self.layers.feature_extractor.modules():
            if isinstance(module, ClipNorm):  # only the first convolution has one
                module.lengths = (lengths - kernel) // stride + 1
        mask = (torch.arange(longest, device=waveforms.device) < lengths[:, None]).long()
        dtype = self.layers.feature_projection.projection.weight.dtype
        return self.layers(waveforms.to(dtype), attention_mask=mask).last_hidden_state


class FilterBankEncoder(Encoder):
    """Encoders of filter banks of any length. Subclasses set `shortest` and implement `banks` and
    `bank_frames`."""

    window_seconds = None
    shortest: int  # samples of the shortest clip; shorter ones are padded with silence
    #: Values of preprocessor_config.json by which the filter banks are computed.
    computed: dict[str, float]

    def __init__(self, config: EncoderConfig, layers: nn.Module, source: Source):
        super().__init__(config)
        self.layers = layers
        self.width = self.layers.config.hidden_size
        given = preprocessor_settings(source.folder)
        for key, value in self.computed.items():
            if given.get(key, value) != value:
                raise SourceError(
                    f"{source.folder}: the feature extractor's {key} is {given[key]}, and this encoder's "
                    f"features are computed with {value:g}: use a checkpoint with that value"
                )

    @abstractmethod
    def banks(self, waveforms: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """waveforms [A, S], lengths [A] -> what the network takes, [A, F, C]."""

    @abstractmethod
    def bank_frames(self, samples: torch.Tensor) -> torch.Tensor:
        """Frames F of clips of that many samples."""

    def encode(
        self, waveforms: torch.Tensor, lengths: torch.Tensor, mel_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        longest = max(self.shortest, self.pad_to_samples or waveforms.shape[1])
        waveforms = padded(waveforms, lengths, longest)
        lengths = lengths.clamp(min=longest if self.pad_to_samples else self.shortest)
        banks = self.masked(self.banks(waveforms, lengths), mel_mask)
        valid = torch.arange(banks.shape[1], device=banks.device) < self.bank_frames(lengths)[:, None]
        dtype = next(self.layers.parameters()).dtype
        return self.layers(banks.to(dtype), attention_mask=valid.long()).last_hidden_state

    def masked(self, banks: torch.Tensor, mel_mask: torch.Tensor | None) -> torch.Tensor:
        if mel_mask is not None:
            raise ValueError("data.spec_augment masks a mel, which this encoder does not see: switch it off")
        return banks


class W2VBertEncoder(FilterBankEncoder):
    """w2v-BERT 2.0: pairs of Kaldi filter banks (50 a second), then Conformer layers."""

    frame_rate = 50.0
    shortest = WINDOW + HOP  # two frames, which are one pair
    computed = {"num_mel_bins": 80, "stride": 2}

    def frames(self, samples: torch.Tensor) -> torch.Tensor:
        return kaldi_frames(samples.clamp(min=self.shortest)) // 2

    bank_frames = frames

    def input_sizes(self, samples: int) -> tuple[int, ...]:
        return int(self.frames(torch.tensor(samples))), self.layers.config.feature_projection_input_dim

    def banks(self, waveforms: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        banks = kaldi_banks(waveforms, lengths, self.layers.config.feature_projection_input_dim // 2)
        return banks[:, : banks.shape[1] // 2 * 2].reshape(len(banks), banks.shape[1] // 2, -1)


class ParakeetLayers(ParakeetEncoder):
    """The encoder out of a whole Parakeet: the tensors of its decoder are skipped without a warning."""

    _keys_to_ignore_on_load_unexpected = [r"ctc_head\.", r"decoder\.", r"joint\.", r"encoder_projector\."]


class ParakeetFastConformer(FilterBankEncoder):
    """Parakeet's FastConformer: log-mel, convolutions that keep every eighth frame (12.5 a second), then
    Conformer layers."""

    shortest = 2 * HOP
    computed = {"hop_length": HOP, "n_fft": FFT, "win_length": WINDOW, "preemphasis": 0.97}

    def __init__(self, config: EncoderConfig, layers: ParakeetEncoder, source: Source):
        super().__init__(config, layers, source)
        self.frame_rate = SAMPLE_RATE / HOP / layers.config.subsampling_factor

    def bank_frames(self, samples: torch.Tensor) -> torch.Tensor:
        return nemo_frames(samples)

    def frames(self, samples: torch.Tensor) -> torch.Tensor:
        banks = nemo_frames(samples.clamp(min=self.shortest))
        return self.layers._get_subsampling_output_length(banks).long()

    def input_sizes(self, samples: int) -> tuple[int, ...]:
        return max(samples, self.shortest) // HOP, self.layers.config.num_mel_bins

    def banks(self, waveforms: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        return nemo_log_mel(waveforms, lengths, self.layers.config.num_mel_bins)

    def masked(self, banks: torch.Tensor, mel_mask: torch.Tensor | None) -> torch.Tensor:
        if mel_mask is None:
            return banks
        mel_mask = mel_mask[..., : banks.shape[1]].transpose(1, 2)
        mel_mask = F.pad(mel_mask, (0, 0, 0, banks.shape[1] - mel_mask.shape[1]))
        return banks.masked_fill(mel_mask, 0.0)


def build_encoder(
    config: EncoderConfig, source: Source, dtype: torch.dtype, attention: str | None, *, weights: bool = True
) -> Encoder:
    """The encoder; without `weights` on the meta device, for its sizes. Errors: SourceError for an unknown
    family."""
    family = source.config.model_type
    wrapper, layers, renamed, _ = _family(source)
    sizes = encoder_sizes(source.config)
    if getattr(sizes, "add_adapter", False):
        raise SourceError(
            f"{source.name} has an adapter that drops frames (add_adapter): save the model again without it"
        )
    if attention == "flash_attention_2" and not layers._supports_flash_attn:
        attention = None  # a setting for the LLM, too
    if weights:
        tensor_files(source.files)  # a file that is missing or cut is named
        with reading(source.files, "weights for its config.json"):
            network, report = layers.from_pretrained(
                source.files,
                config=sizes,
                dtype=dtype,
                attn_implementation=attention,
                key_mapping=renamed,
                output_loading_info=True,
                use_safetensors=True,
            )
        if report["missing_keys"]:
            raise SourceError(
                f"{source.folder} lacks {len(report['missing_keys'])} of the encoder's tensors, "
                f"{sorted(report['missing_keys'])[0]} for one: it is not a whole {family} model"
            )
    else:
        with torch.device("meta"):
            network = layers(sizes).to(dtype)
    return wrapper(config, network, source).requires_grad_(False).eval()


def encoder_sizes(config: PretrainedConfig) -> PretrainedConfig:
    """Return the part of a model's configuration that sizes its encoder."""
    return getattr(config, "encoder_config", config)


def _family(source: Source) -> tuple:
    if source.config.model_type not in _FAMILIES:
        raise SourceError(
            f"{source.name} is a '{source.config.model_type}' model; encoders known: {', '.join(_FAMILIES)}"
        )
    return _FAMILIES[source.config.model_type]


def encoder_classes(model_type: str) -> tuple[Any, Any]:
    """Return this module's class and transformers' network of a known family."""
    wrapper, network, *_ = _FAMILIES[model_type]
    return wrapper, network


def tensor_prefix(source: Source) -> str:
    """What the encoder's tensors are called under in its folder, where the folder holds other things, too.
    Errors: SourceError for an unknown family."""
    return _family(source)[3]


# model_type -> (our class, transformers' network, renaming of its tensors in a whole model's file, their
# prefix there)
_FAMILIES = {
    "whisper": (WhisperEncoder, WhisperLayers, {r"^(model\.)?encoder\.": ""}, "encoder."),
    "wav2vec2": (WaveformEncoder, Wav2Vec2Model, None, "wav2vec2."),
    "hubert": (WaveformEncoder, HubertModel, None, "hubert."),
    "wavlm": (WaveformEncoder, WavLMModel, None, "wavlm."),
    "wav2vec2-bert": (W2VBertEncoder, Wav2Vec2BertModel, None, "wav2vec2_bert."),
    **dict.fromkeys(
        ("parakeet_encoder", "parakeet_ctc", "parakeet_rnnt", "parakeet_tdt"),
        (ParakeetFastConformer, ParakeetLayers, {r"^encoder\.": ""}, "encoder."),
    ),
}
