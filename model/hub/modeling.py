"""Soundwave for transformers: a speech LLM that compresses audio by CTC over the LLM's own vocabulary.

    frozen encoder -> alignment adapter -> CTC head -> frames of CTC's peaks -> shrinking adapter -> LLM

Method: Zhang et al., ACL 2025, arXiv 2502.12900.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel

from model.alignment import AlignmentAdapter, CTCHead
from model.compressors import CIF, AllFrames, CTCPeaks, Stacked
from model.encoder import Encoder, WaveformEncoder, encoder_classes
from model.hub.configuration import SoundwaveHubConfig
from model.soundwave import Soundwave

#: model.compressor -> its network.
COMPRESSORS = {"ctc_peaks": CTCPeaks, "all_frames": AllFrames, "stacked": Stacked, "cif": CIF}


def encoder_of(config: SoundwaveHubConfig) -> Encoder:
    """The encoder, with fresh weights."""
    settings: Any = SimpleNamespace(**config.soundwave["encoder"])  # in place of EncoderConfig
    sizes: Any = config.encoder_config
    source: Any = SimpleNamespace(folder=None)  # in place of Source
    wrapper, layers = encoder_classes(sizes.model_type)
    encoder: Encoder = wrapper(settings, layers(sizes), source)
    if isinstance(encoder, WaveformEncoder):
        encoder.normalise = config.normalise_waveforms
    return encoder


class SoundwaveForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """Audio and text in, text out. Inputs are made by the processor: `processor.apply_chat_template`."""

    config_class = SoundwaveHubConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _no_split_modules = [
        "WhisperEncoder",
        "WaveformEncoder",
        "W2VBertEncoder",
        "ParakeetFastConformer",
        "AlignmentAdapter",
        "CTCHead",
        "CTCPeaks",
        "AllFrames",
        "Stacked",
        "CIF",
    ]
    # The adapters were trained in fp32 and run in it, whatever the type of the frozen parts.
    _keep_in_fp32_modules_strict = ["alignment", "shrinking", "blank_row"]

    def __init__(self, config: SoundwaveHubConfig):
        super().__init__(config)
        sizes = config.llm_config.get_text_config()
        width, heads = sizes.hidden_size, sizes.num_attention_heads
        self.encoder = encoder_of(config)
        self.llm = AutoModelForCausalLM.from_config(config.llm_config)
        self.alignment = AlignmentAdapter(config.alignment, self.encoder.width, width, heads)
        kind = config.alignment.ctc_head
        embeddings = (
            self.llm.get_output_embeddings().weight
            if kind == "tied"
            else torch.empty(config.ctc_rows, width, dtype=torch.float32)
        )
        ops: Any = SimpleNamespace(**config.soundwave["ops"])  # in place of OpsConfig
        audio_id = min(config.audio_token_id, config.ctc_rows - 1)
        self.ctc_head = CTCHead(kind, embeddings, 1.0, audio_id, ops)
        if kind == "tied":
            name = next(n for n, p in self.llm.named_parameters() if p is embeddings)
            name = self.llm.all_tied_weights_keys.get(name, name)  # an LLM may tie its own two tables
            self._tied_weights_keys = {"ctc_head.weight": f"llm.{name}"}
        else:
            self._keep_in_fp32_modules_strict = [*self._keep_in_fp32_modules_strict, "ctc_head"]
        compressor: Any = COMPRESSORS[config.compressor]  # takes this configuration like SoundwaveConfig
        self.shrinking = compressor(config, width, heads, 1.0)
        self.audio_id = config.audio_token_id
        self.post_init()
        self.eval()

    encode = Soundwave.encode
    encode_audio = Soundwave.encode_audio
    embeddings = Soundwave.embeddings

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: all weights are read."""

    def get_input_embeddings(self) -> nn.Module:
        return self.llm.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.llm.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.llm.get_output_embeddings()

    def _inputs(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        waveforms: torch.Tensor | None,
        waveform_lengths: torch.Tensor | None,
        labels: torch.Tensor | None,
        left_padded: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The LLM's embeddings [B, L, D], mask [B, L] and labels [B, L]."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if (waveforms is None) != (waveform_lengths is None):
            raise ValueError("give waveforms and waveform_lengths together, as the processor makes them")
        silent = waveforms is None or not len(waveforms)
        if waveforms is None or silent:
            waveforms = torch.zeros(1, 3200, device=input_ids.device)
            waveform_lengths = torch.tensor([3200], device=input_ids.device)
        network: Any = self  # the methods are those of Soundwave
        batch = SimpleNamespace(
            waveforms=waveforms.float(),
            features=None,
            audio_lengths=waveform_lengths,
            audio_is_dummy=silent,
            mel_mask=None,
            audio_keys=None,
            row_keys=None,
            input_ids=input_ids,
            attention_mask=attention_mask,
            labels=labels if labels is not None else torch.full_like(input_ids, -100),
            ids=[],
            has_transcript=torch.zeros(len(waveforms), dtype=torch.bool, device=input_ids.device),
            ctc_target_lengths=torch.zeros(len(waveforms), dtype=torch.long, device=input_ids.device),
        )
        return network.embeddings(batch, network.encode_audio(batch), left_padded=left_padded)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        waveforms: torch.Tensor | None = None,
        waveform_lengths: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **options,
    ):
        """Return the LLM's output; its positions hold the compressed audio in the place of the audio token.

        input_ids, attention_mask, labels [B, L]; waveforms [A, S] at 16 kHz with waveform_lengths [A], in the
        order of the audio tokens.
        """
        embeddings, mask, spread = self._inputs(
            input_ids, attention_mask, waveforms, waveform_lengths, labels, False
        )
        labels = None if labels is None else spread
        return self.llm(inputs_embeds=embeddings, attention_mask=mask, labels=labels, **options)

    @torch.no_grad()
    def generate(  # type: ignore[override]  # takes what the processor gives
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        waveforms: torch.Tensor | None = None,
        waveform_lengths: torch.Tensor | None = None,
        generation_config=None,
        **options,
    ):
        """Return what the LLM's `generate` does for the prompts: the answers' ids, without the prompts."""
        embeddings, mask, _ = self._inputs(input_ids, attention_mask, waveforms, waveform_lengths, None, True)
        settings = copy.deepcopy(generation_config or self.generation_config)
        others = settings.update(**options)
        return self.llm.generate(
            inputs_embeds=embeddings, attention_mask=mask, generation_config=settings, **others
        )
