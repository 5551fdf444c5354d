"""The language model: any decoder-only LLM of transformers, with LoRA by peft, and its tokenizer with the audio token."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AddedToken, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from model.config import LLMConfig
from model.pretrained import Source, SourceError


def load_tokenizer(source: Source, audio_token: str) -> PreTrainedTokenizerBase:
    """The LLM's tokenizer with `audio_token` as one special token (added at its end unless it is there already)."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.folder)
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise SourceError(f"{source.folder} has no tokenizer that loads ({reason}): save the LLM's tokenizer there") from None
    if audio_token not in tokenizer.get_vocab():
        tokenizer.add_tokens([AddedToken(audio_token, special=True, normalized=False)], special_tokens=True)
    return tokenizer


def build_llm(config: LLMConfig, source: Source, dtype: torch.dtype, attention: str | None) -> nn.Module:
    """The frozen LLM with fresh LoRA (which starts as the identity); on the meta device where the source has no weights."""
    options = {"dtype": dtype, "attn_implementation": attention}
    if hasattr(source.config, "attention_dropout"):
        source.config.attention_dropout = 0.0  # a frozen base is not regularised
    if source.folder is None:
        with torch.device("meta"):
            llm = AutoModelForCausalLM.from_config(source.config, **options)
    else:
        try:
            llm = AutoModelForCausalLM.from_pretrained(source.folder, config=source.config, **options)
        except (ValueError, ImportError) as error:
            if attention is None or "attention" not in str(error).lower():
                raise
            raise SourceError(f"{source.name} does not run with model.attention_implementation={attention} "
                              f"({str(error).split('.')[0]}): set it to eager or auto") from None
    llm.requires_grad_(False)
    if config.lora_r == 0:
        return llm
    lora = LoraConfig(r=config.lora_r, lora_alpha=config.lora_alpha, lora_dropout=config.lora_dropout,
                      target_modules=list(config.lora_targets), task_type="CAUSAL_LM")
    try:
        return get_peft_model(llm, lora)
    except ValueError as error:
        raise SourceError(f"LoRA does not fit {source.name}: model.llm.lora_targets = {list(config.lora_targets)} "
                          f"({str(error).splitlines()[0]})") from None


def base_of(llm: nn.Module) -> nn.Module:
    """The transformers model, with or without LoRA around it."""
    return llm.get_base_model() if isinstance(llm, PeftModel) else llm


def lora_parameters(llm: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in llm.named_parameters() if "lora_" in name]


def embed(llm: nn.Module, input_ids: torch.Tensor, audio_id: int) -> torch.Tensor:
    """input_ids [B, L] -> embeddings [B, L, D]; the audio token, which may lie beyond the table, reads row 0."""
    return base_of(llm).get_input_embeddings()(input_ids.masked_fill(input_ids == audio_id, 0))


def target_loss(llm: nn.Module, embeddings: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """embeddings [B, L, D], mask [B, L], labels [B, L] (-100: none) -> cross-entropy summed over the target tokens.

    Logits exist only where a label is: the hidden states in front of the output embeddings are reduced to those positions
    (L x |V| in fp32 is 0.5 GiB for 1,024 positions at |V| = 128,256). A hook does it, so that what the model's own
    forward does behind its head (Gemma 2 caps its logits) stays. Without any target one position is run and counts nothing.
    """
    rows, columns = torch.nonzero(labels[:, 1:] != -100, as_tuple=True)  # position i predicts label i + 1
    targets = labels[rows, columns + 1]
    if not len(rows):
        rows, columns, targets = rows.new_zeros(1), columns.new_zeros(1), targets.new_full((1,), -100)

    def select(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (inputs[0][rows, columns].unsqueeze(0),)

    handle = base_of(llm).get_output_embeddings().register_forward_pre_hook(select)
    try:
        logits = llm(inputs_embeds=embeddings, attention_mask=mask, use_cache=False).logits[0]  # [N, V]
    finally:
        handle.remove()
    loss = F.cross_entropy(logits.float(), targets.clamp(min=0), reduction="none")
    return (loss * (targets != -100)).sum()


def splice(text: torch.Tensor, input_ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor | None, audio: torch.Tensor,
           audio_lengths: torch.Tensor, audio_id: int, *, left_padded: bool = False
           ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Put the audios in the place of their tokens.

    text [B, L, D] embeddings of input_ids [B, L] under mask [B, L] (padding on either side); audio [A, K, D] with lengths [A],
    in the order of the audio tokens, row by row -> embeddings [B, L', D], mask [B, L'], labels [B, L'] (-100 on audio).
    """
    batch = input_ids.shape[0]
    is_text = mask.bool() & (input_ids != audio_id)
    is_audio = mask.bool() & (input_ids == audio_id)
    span = is_text.long()
    span[is_audio] = audio_lengths.to(span.dtype)
    ends = span.cumsum(1)
    lengths = ends[:, -1]
    width = int(lengths.max())
    starts = ends - span + ((width - lengths)[:, None] if left_padded else 0)
    starts = starts + width * torch.arange(batch, device=text.device)[:, None]  # in the flattened result
    within = torch.arange(audio.shape[1], device=text.device)
    valid = within < audio_lengths[:, None]
    places = torch.cat([starts[is_text], (starts[is_audio][:, None] + within)[valid]])
    values = torch.cat([text[is_text], audio[valid].to(text.dtype)])
    embeddings = text.new_zeros(batch * width, text.shape[-1]).index_copy(0, places, values)
    new_mask = mask.new_zeros(batch * width).index_fill(0, places, 1)
    new_labels = input_ids.new_full((batch * width,), -100)
    if labels is not None:
        new_labels[starts[is_text]] = labels[is_text]
    return embeddings.view(batch, width, -1), new_mask.view(batch, width), new_labels.view(batch, width)
