"""The whole network: encoder -> alignment adapter -> CTC head -> shrinking adapter -> LLM with LoRA.

One forward for all stages; a stage names its losses and the parts that learn. Whatever a batch
holds, the same modules run in the same order (under ZeRO-3 ranks wait for each other in every module): a
batch without audio brings a silent dummy whose result is multiplied by 0, a batch without targets still
passes the LLM.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase

from core.options import problems
from model import identity, lora_init, trained_encoder
from model.alignment import AlignmentAdapter, CTCHead
from model.batch import Batch
from model.compressors import Compressor, CTCView, compressor_of
from model.config import OptionError, SoundwaveConfig
from model.dropout import LoraDropout, TokenKeys
from model.encoder import Encoder, build_encoder, tensor_prefix
from model.generation.greedy import Generation
from model.language_model import (
    LLM,
    audio_token_id,
    base_of,
    build_llm,
    embed,
    is_lora,
    load_tokenizer,
    lora_parameters,
    splice,
)
from model.losses import LOSSES, ForwardState
from model.pretrained import (
    DTYPES,
    SourceError,
    attention_implementation,
    embedding_statistics,
    fingerprint,
    locate,
    output_embeddings,
    text_config,
)
from model.saved_modules import original_of
from model.stages import ALIGNMENT, PARTS, SHRINKING, STAGES, Stage, chosen


class Output(NamedTuple):
    """Sums, not means: whoever trains divides by the counts of the whole global batch."""

    sums: dict[str, torch.Tensor]  # of each loss that was asked for (model/losses)
    frames: torch.Tensor  # adapter frames of real audio
    kept: torch.Tensor  # of those, frames that the LLM gets
    llm_tokens: torch.Tensor  # LLM positions, audio included

    @property
    def ce_sum(self) -> torch.Tensor:
        """Cross-entropy over target tokens; 0 where it was not asked for."""
        return self.sums.get("ce", torch.zeros(()))

    @property
    def ctc_sum(self) -> torch.Tensor:
        """CTC loss / target length over transcribed utterances; 0 where it was not asked for."""
        return self.sums.get("ctc", torch.zeros(()))


class CTCFrames(NamedTuple):
    """The alignment adapter's frames of a batch's audio, and what the CTC head finds in them."""

    hidden: torch.Tensor  # [A, T, D]
    lengths: torch.Tensor  # [A]
    argmax: torch.Tensor  # [A, T]
    peak: torch.Tensor  # [A, T] log-probability of the argmax
    blank_logprob: torch.Tensor  # [A, T]


class Audio(NamedTuple):
    """A batch's audio on its way to the LLM."""

    hidden: torch.Tensor  # [A, T, D]
    lengths: torch.Tensor  # [A]
    ctc: torch.Tensor  # [A] loss / target length
    argmax: torch.Tensor  # [A, T]
    peak: torch.Tensor  # [A, T] log-probability of the argmax
    blank_logprob: torch.Tensor  # [A, T]
    kept: torch.Tensor  # [A, K] frame positions
    kept_lengths: torch.Tensor  # [A]
    compressed: torch.Tensor | None  # [A, K, D], what the LLM reads; None without the LLM
    losses: dict[str, torch.Tensor]  # [A] each: auxiliary losses of the compressor

    def rows(self, rows: torch.Tensor | list[int]) -> Audio:
        """Return some of the audios."""
        tensors = {name: value[rows] for name, value in self._asdict().items() if torch.is_tensor(value)}
        return self._replace(**tensors, losses={name: value[rows] for name, value in self.losses.items()})


class Soundwave(Generation):
    def __init__(
        self,
        config: SoundwaveConfig,
        *,
        tokenizer: PreTrainedTokenizerBase | None,
        encoder: Encoder | None,
        alignment: AlignmentAdapter,
        ctc_head: CTCHead,
        shrinking: Compressor | None,
        llm: LLM | None,
        sources: dict,
    ):
        super().__init__()
        self.config, self.sources = config, sources
        # A model of sizes alone has none, and neither reads nor writes text.
        self.tokenizer = cast(PreTrainedTokenizerBase, tokenizer)
        self.encoder: Encoder | None = encoder
        self.alignment, self.ctc_head = alignment, ctc_head
        self.shrinking, self.llm = shrinking, llm
        self.audio_id = -1 if tokenizer is None else audio_token_id(tokenizer, config.audio_token)
        self.stage = SHRINKING.name if llm is not None else ALIGNMENT.name
        self.lengths_of_last_batch = (torch.zeros(0), torch.zeros(0))
        self.unanswered = {}
        self.trained_seconds = None
        self.ctc_text = "lower"  # how the CTC targets are normalised: data.ctc_text of the recipe
        # Parameters of encoder and LLM that differ, or will, from those of their own folders.
        self.tuned: set[str] = set()
        self.set_stage(self.stage)

    @classmethod
    def build(
        cls,
        config: SoundwaveConfig,
        *,
        parts: tuple[str, ...] = PARTS,
        device: torch.device | str | None = None,
        meta: bool = False,
        starts_lora: bool = True,
    ) -> Soundwave:
        """Frozen parts from their folders, fresh adapters and LoRA.

        starts_lora: False where a file fills LoRA, so that the LLM's weights need not be decomposed
        (`model.llm.lora_init`).

        parts without "llm": stage 1; of the LLM only its embeddings are read, from its safetensors, and there
        is no shrinking adapter. parts without "encoder": for cached features. meta: sizes alone, nothing is
        read or fetched (names of model/presets, or folders with a config.json). Errors: SourceError,
        OptionError, one line each.
        """
        for key, problem in problems(config, "model."):
            raise OptionError(f"{key} {problem}")
        dtype = DTYPES[config.dtype]
        sources = {
            "encoder": locate(config.encoder.name, sizes_only=meta),
            "llm": locate(config.llm.name, sizes_only=meta),
        }
        if meta:
            sources = {name: source.without_weights() for name, source in sources.items()}
        attention = attention_implementation(config.attention_implementation, dtype)
        encoder = build_encoder(
            config.encoder, sources["encoder"], dtype, attention, weights="encoder" in parts and not meta
        )
        if config.encoder.lora_r:
            trained_encoder.add_lora(encoder, config.encoder, sources["encoder"].config.model_type)
        sizes = text_config(sources["llm"].config)
        width, heads, rows = sizes.hidden_size, sizes.num_attention_heads, sizes.vocab_size

        with torch.device("meta" if meta else "cpu"):
            tokenizer = None if meta else load_tokenizer(sources["llm"], config.audio_token)
            audio_id = rows if tokenizer is None else audio_token_id(tokenizer, config.audio_token)
            input_rms, output_rms = (1.0, 1.0) if meta else embedding_statistics(sources["llm"])
            llm = build_llm(config.llm, sources["llm"], dtype, attention) if "llm" in parts else None
            alignment = AlignmentAdapter(
                config.alignment, encoder.width, width, heads, gain=min(1.0, 1 / (output_rms * width**0.5))
            )
            if llm is not None and config.alignment.ctc_head == "tied":
                embeddings = cast(Any, original_of(base_of(llm).get_output_embeddings())).weight
            else:
                embeddings = (
                    torch.empty(rows, width, dtype=dtype)
                    if meta
                    else output_embeddings(sources["llm"], dtype)
                )
            ctc_head = CTCHead(config.alignment.ctc_head, embeddings, output_rms, audio_id, config.ops)
            gain = input_rms if config.shrinking.init_gain_to_embeddings else 1.0
            shrinking = compressor_of(config)(config, width, heads, gain) if llm is not None else None
        model = cls(
            config,
            tokenizer=tokenizer,
            encoder=encoder if "encoder" in parts else None,
            alignment=alignment,
            ctc_head=ctc_head,
            shrinking=shrinking,
            llm=llm,
            sources=sources,
        )
        if starts_lora and not meta:
            model.start_lora()
        return model if device is None else model.to(device)

    # ---- what is trained ----

    def start_lora(self, device: torch.device | str = "cpu") -> None:
        """Start LoRA at the components of the LLM's weights, where `model.llm.lora_init` is of that kind;
        computed on `device`. Collective."""
        kind = self.config.llm.lora_init
        if isinstance(self.llm, PeftModel) and lora_init.takes_components(kind):
            lora_init.decompose(self.llm, kind, DTYPES[self.config.dtype], device)

    def set_stage(self, stage: str | Stage) -> None:
        """Train the modules that a stage names: one of STAGES by its name, or a recipe's own choice
        (`stages.chosen`). Of a tied CTC head the blank's row is trained, the embeddings never. Frozen parts
        stay in eval mode. Errors: ValueError."""
        if isinstance(stage, str) and stage not in STAGES:
            raise ValueError(STAGES.describe_unknown(stage))
        choice = chosen(STAGES[stage], {}) if isinstance(stage, str) else stage
        if choice.needs_llm and self.llm is None:
            raise ValueError(f"stage {choice.name} needs the LLM: build the model with parts including 'llm'")
        self.stage, self.choice = choice.name, choice
        self.requires_grad_(False)
        for name in choice.trains:
            for parameter in self._trained_of(name):
                parameter.requires_grad_(True)
        if self.ctc_head.kind == "tied":
            self.ctc_head.weight.requires_grad_(False)
        if self.encoder is not None:
            self.encoder.learns = any(p.requires_grad for p in self.encoder.parameters())
        self.tuned |= {
            trained_encoder.canonical(name)
            for group in ("encoder", "llm")
            for name, _ in self.parameter_groups().get(group, [])
        }
        self.train(self.training)

    def _trained_of(self, module: str) -> list[nn.Parameter]:
        """Return the parameters of a module of stages.TRAINABLE. Errors: ValueError."""
        if module in ("lora", "llm") and self.llm is None:
            raise ValueError(f"stage {self.stage} trains the LLM: build the model with it")
        if module == "lora":
            return [parameter for _, parameter in lora_parameters(cast(LLM, self.llm))]
        if module == "llm":
            base = base_of(cast(LLM, self.llm))
            if base is not self.llm:
                raise OptionError(
                    "train.llm is all, and the LLM has LoRA: set model.llm.lora_r=0 (of a model folder with "
                    "LoRA make one without first: python -m model.export FOLDER --merge)"
                )
            tables = (base.get_input_embeddings(), base.get_output_embeddings())
            fixed = {id(p) for table in tables for p in table.parameters()}
            return [p for p in base.parameters() if id(p) not in fixed]
        if module in ("encoder", "encoder_lora"):
            if self.encoder is None:
                raise ValueError(f"stage {self.stage} trains the encoder: build the model with it")
            if module == "encoder_lora":
                return trained_encoder.lora_parameters(self.encoder)
            return trained_encoder.trained_parameters(self.encoder, self.choice.encoder_layers)
        return list(getattr(self, module).parameters())

    def train(self, mode: bool = True) -> Soundwave:
        super().train(mode)
        stage = self.choice
        if self.encoder is not None:
            trained_encoder.set_modes(self.encoder, mode)
        for name in ("alignment", "ctc_head", "shrinking"):
            part = getattr(self, name)
            if part is not None and name not in stage.trains:
                part.eval()
        if self.llm is not None:
            # In eval mode: it draws no random number and changes no weight of its own (some do in training).
            for module in self.llm.modules():
                # transformers computes a layer again in backward where the layer itself is in training mode.
                checkpointed = stage.needs_llm and getattr(module, "gradient_checkpointing", False)
                drops = "lora" in stage.trains and isinstance(module, LoraDropout)
                module.training = mode and (checkpointed or drops)
        return self

    def parameter_groups(self) -> dict[str, list[tuple[str, nn.Parameter]]]:
        """Named trainable parameters by the learning rate they take."""
        groups: dict[str, list[tuple[str, nn.Parameter]]] = {"adapters": [], "ctc_head": [], "lora": []}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                part = name.partition(".")[0]
                group = part if part in ("ctc_head", "encoder", "llm") else "adapters"
                if part == "llm" and is_lora(name):
                    group = "lora"
                groups.setdefault(group, []).append((name, parameter))
        return groups

    def shared_parameters(self) -> list[tuple[nn.Module, nn.Parameter]]:
        """Parameters that a module uses and another one owns, too: a tied CTC head's weight is the LLM's own
        parameter. It is registered in the head, so that ZeRO-3's hooks gather it there."""
        shared = self.llm is not None and self.ctc_head.kind == "tied"
        return [(self.ctc_head, self.ctc_head.weight)] if shared else []

    def enable_activation_checkpointing(self) -> None:
        """Keep only the inputs of the LLM's layers, and of the encoder's where it is trained, and compute the
        rest again in backward. Errors: SourceError for LLMs that cannot."""
        if self.encoder is not None and self.encoder.learns:
            trained_encoder.checkpoint_layers(self.encoder)
            self.train(self.training)
        if self.llm is None:
            return
        try:
            tokens = cast(TokenKeys, cast(Any, self.llm).token_keys)  # model.dropout put it there
            self.llm.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False, "context_fn": tokens.for_checkpoint}
            )
        except ValueError as error:
            raise SourceError(
                f"optim.activation_checkpointing does not work with {self.sources['llm'].name} "
                f"({str(error).splitlines()[0]}): set it to false"
            ) from None
        self.train(self.training)

    def frozen_hash(self) -> dict[str, str]:
        """sha256 of the frozen parts' tensors, from their files. (What else decides their numbers:
        `frozen_settings`.)"""
        if not hasattr(self, "_hashes"):
            encoder, llm = self.sources["encoder"], self.sources["llm"]
            self._hashes = {
                "encoder": fingerprint(encoder.files, tensor_prefix(encoder)),
                "llm": fingerprint(llm.files),
            }
        return self._hashes

    def frozen_settings(self) -> dict[str, object]:
        """Configurations, preprocessor, tokenizer with chat template and end tokens of the frozen parts
        (model/identity.py)."""
        return identity.settings(self.sources, self.tokenizer)

    # ---- forward ----

    def encode(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Encoder frames of a batch's audio, computed or from the cache: features [A, T, E], lengths [A]."""
        if batch.features is not None:
            return batch.features, batch.audio_lengths
        if self.encoder is None:
            raise ValueError("the model was built without its encoder: give batches with cached features")
        return self.encoder(
            batch.waveforms, batch.audio_lengths, self.config.alignment.ctc_length == "full", batch.mel_mask
        )

    def encode_audio(self, batch: Batch, with_ctc: bool = False, frames: CTCFrames | None = None) -> Audio:
        """Everything up to the compressed frames; with_ctc: the CTC loss, too. frames: of the batch's audio,
        where the caller has them, for inference."""
        if frames is None:
            hidden, lengths = self.alignment(*self.encode(batch), batch.audio_keys)
            targets = (batch.ctc_targets, batch.ctc_target_lengths) if with_ctc else ()
            loss, argmax, peak, blank_logprob = self.ctc_head(hidden, lengths, *targets)
        else:
            hidden, lengths, argmax, peak, blank_logprob = frames
            loss = peak.new_zeros(len(peak))
        view = CTCView(
            argmax,
            peak.detach(),
            blank_logprob.detach(),
            self.ctc_head.blank,
            torch.where(batch.has_transcript, batch.ctc_target_lengths, 0),
            batch.audio_keys,
        )
        compressed, auxiliary = None, {}
        if self.shrinking is None:
            kept, kept_lengths = compressor_of(self.config).select(self.config, lengths, view)
        else:  # the view by keyword: ZeRO-3's hooks look for tensors with gradients in what is given by place
            compressed, kept_lengths, auxiliary, kept = self.shrinking(hidden, lengths, ctc=view)
        self.lengths_of_last_batch = (lengths, kept_lengths)
        return Audio(
            hidden, lengths, loss, argmax, peak, blank_logprob, kept, kept_lengths, compressed, auxiliary
        )

    def embeddings(
        self, batch: Batch, audio: Audio, left_padded: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The LLM's input: embeddings [B, L, D], mask [B, L], labels [B, L]."""
        llm, shrunk = self.llm, audio.compressed
        if llm is None or shrunk is None:
            raise ValueError("the model was built without its LLM: only the CTC head can be used")
        if self.config.shrinking.token_embeddings:
            tokens = audio.argmax.gather(1, audio.kept)
            is_label = (tokens != self.ctc_head.blank) & (
                torch.arange(tokens.shape[1], device=tokens.device) < audio.kept_lengths[:, None]
            )
            words = embed(llm, tokens.masked_fill(~is_label, 0), self.audio_id)
            shrunk = shrunk + is_label[..., None] * words.to(shrunk.dtype)
        text = embed(llm, batch.input_ids, self.audio_id)
        places = int((batch.attention_mask.bool() & (batch.input_ids == self.audio_id)).sum())
        audios = 0 if batch.audio_is_dummy else len(shrunk)
        if places != audios:
            raise ValueError(
                f"batch has {audios} audios and {places} {self.config.audio_token} in its text "
                f"({batch.ids[:3]} ...)"
            )
        embeddings, mask, labels = splice(
            text,
            batch.input_ids,
            batch.attention_mask,
            batch.labels,
            shrunk[:audios],
            audio.kept_lengths[:audios],
            self.audio_id,
            left_padded=left_padded,
        )
        # the dummy's modules are part of the graph; of real clips, a NaN or a sum's overflow would reach all
        # rows
        if not audios:
            embeddings = embeddings + 0.0 * shrunk.sum().to(text.dtype)
        return embeddings, mask, labels

    def forward(self, batch: Batch, *, losses: tuple[str, ...] = ("ctc",)) -> Output:
        """losses: names of LOSSES; ("ctc",) in stage 1, ("ce", "ctc") in stage 2, ("ce",) in stage 3."""
        terms = {name: LOSSES[name] for name in losses}
        audio = self.encode_audio(batch, with_ctc=any(term.uses_ctc for term in terms.values()))
        state = ForwardState(self, batch, audio)
        sums = {name: term.numerator(state) for name, term in terms.items()}
        real = 0 if batch.audio_is_dummy else 1
        return Output(sums, real * audio.lengths.sum(), real * audio.kept_lengths.sum(), state.llm_tokens)
