"""The language model: any decoder-only LLM of transformers, with LoRA by peft, and its tokenizer with the
audio token."""

from __future__ import annotations

import copy
import re
import warnings
from collections import Counter
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.other import get_pattern_key
from torch import nn
from transformers import (
    AddedToken,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D

from core.console import one_line, shown
from core.near_names import either, near_names
from model import lora_init
from model.config import LLMConfig
from model.dropout import key_lora_dropout, position_keys
from model.pretrained import Source, SourceError, causal_lm_class, reading, tensor_files, text_config
from model.prompt import stop_ids
from model.quantised import quantise
from model.saved_modules import MARK, check_no_lora_inside, saved_modules

# transformers 5.23 renames gradient_checkpointing_enable; peft 0.21 and this module call the name that older
# versions have, too.
warnings.filterwarnings("ignore", r"`(is_)?gradient_checkpointing\w*` is deprecated", category=FutureWarning)

LLM = PreTrainedModel | PeftModel  # the latter with LoRA
ALL_LINEAR = "all-linear"  # peft's keyword
# transformers names its modules so, in every family; MLA: DeepSeek's and Longcat's multi-head latent
# attention.
_ATTENTION = re.compile(r"(Attention|Attn|MLA)$")


def load_tokenizer(source: Source, audio_token: str) -> PreTrainedTokenizerBase:
    """The LLM's tokenizer with `audio_token` as one special token (added at its end unless it is there
    already)."""
    with reading(source.files, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(source.files, trust_remote_code=False)
        if audio_token not in tokenizer.get_vocab():
            tokenizer.add_tokens(
                [AddedToken(audio_token, special=True, normalized=False)], special_tokens=True
            )
    return tokenizer


def audio_token_id(tokenizer: PreTrainedTokenizerBase, audio_token: str) -> int:
    """Return the id of the audio token of a tokenizer from `load_tokenizer`."""
    return cast(int, tokenizer.convert_tokens_to_ids(audio_token))  # of one token: one id


def without_noise(config: PretrainedConfig) -> PretrainedConfig:
    """Return an LLM's config with every rate of dropout and jitter 0: a frozen base is not regularised.

    Soundwave.train keeps it in eval mode, too; but layers that are computed again in backward are not in that
    mode.
    """
    config = copy.deepcopy(config)
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        for name, value in vars(part).items():
            if (
                ("drop" in name or "jitter" in name)
                and isinstance(value, (int, float))
                and not isinstance(value, bool)
                and value
            ):
                setattr(part, name, type(value)(0))
    return config


def build_llm(config: LLMConfig, source: Source, dtype: torch.dtype, attention: str | None) -> LLM:
    """The frozen LLM with fresh LoRA (which starts as the identity), quantised where `config` asks for it; on
    the meta device, and as it is, where the source has no weights."""
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": attention}
    causal_lm_class(source.config)  # what is no LLM is refused in one line
    quiet = without_noise(source.config)
    loading: dict[str, Any] = {**options, "config": quiet, "output_loading_info": True}
    if source.folder is None:
        with torch.device("meta"):
            llm = AutoModelForCausalLM.from_config(quiet, **options)
    else:
        tensor_files(source.folder)  # a file that is missing or cut is named
        with reading(source.folder, "weights for its config.json"):
            try:
                # With output_loading_info it returns a pair, which its annotation leaves out.
                loaded: Any = AutoModelForCausalLM.from_pretrained(
                    source.folder, trust_remote_code=False, use_safetensors=True, **loading
                )
                llm, report = loaded
            except (ValueError, ImportError) as error:
                if attention is None or "attention" not in str(error).lower():
                    raise
                raise SourceError(
                    f"{source.name} does not run with model.attention_implementation={attention} "
                    f"({str(error).split('.')[0]}): set it to eager or auto"
                ) from None
            except RuntimeError as error:
                if "mismatch" not in str(error):
                    raise
                raise SourceError(
                    f"the tensors of {source.folder} do not have the sizes that its config.json names: copy "
                    f"the "
                    "model again"
                ) from None
        if lacking := sorted(report["missing_keys"]):
            raise SourceError(
                f"{source.folder} lacks {len(lacking)} of the tensors that its config.json asks for, "
                f"'{lacking[0]}' for one: it is not a whole {source.config.model_type} model"
            )
    llm.generation_config = end_settings(source)
    llm.requires_grad_(False)
    if config.lora_r == 0:
        key_lora_dropout(llm)
    else:
        llm = with_lora(llm, config, source.name)
    if config.quantization != "none" and source.folder is not None:
        quantise(llm, config.quantization, source.name)
    return llm


def with_lora(llm: PreTrainedModel, config: LLMConfig, name: str) -> PeftModel:
    """The LLM with LoRA on `config.lora_targets`; the start of PiSSA and OLoRA is 0 until
    `lora_init.decompose` or a file fills it. Errors: SourceError."""
    if problem := lora_init.odd_rank(config):
        raise SourceError(problem)
    targets = lora_targets(llm, config.lora_targets, name)
    linear = _linear_layers(llm)
    whole = saved_modules(llm, config, name)
    check_no_lora_inside(whole, [key for key in linear if _is_target(key, targets)])
    transposed = all(isinstance(linear[key], Conv1D) for key in linear if _is_target(key, targets))  # GPT-2's
    lora = LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        use_rslora=config.lora_rslora,
        use_dora=config.lora_dora,
        init_lora_weights=cast(Any, lora_init.drawn_start(config)),
        rank_pattern=_rank_pattern(config, linear, targets),
        alpha_pattern=_pattern("lora_alpha_pattern", config.lora_alpha_pattern, linear, targets),
        lora_dropout=config.lora_dropout,
        target_modules=targets,
        modules_to_save=whole or None,
        task_type="CAUSAL_LM",
        fan_in_fan_out=transposed,
    )
    try:
        adapted = cast(PeftModel, get_peft_model(llm, lora))  # a PeftMixedModel only where it is asked for
    except ValueError as error:
        raise SourceError(
            f"LoRA does not fit {name}: model.llm.lora_targets = {shown(targets)} ({one_line(error)})"
        ) from None
    key_lora_dropout(adapted)
    if lora_init.takes_components(config.lora_init):
        if problem := lora_init.too_few_components(adapted, config.lora_init):
            raise SourceError(problem)
        lora_init.add_starts(adapted)
    return adapted


def _rank_pattern(
    config: LLMConfig, linear: dict[str, nn.Module], targets: str | list[str]
) -> dict[str, int]:
    """Return peft's rank_pattern. Errors: SourceError for a rank that is no whole number above 0."""
    pattern = _pattern("lora_rank_pattern", config.lora_rank_pattern, linear, targets)
    for name, rank in pattern.items():
        if rank != int(rank):
            raise SourceError(f"model.llm.lora_rank_pattern: {name} has rank {rank:g}: give a whole number")
    return {name: int(rank) for name, rank in pattern.items()}


def _pattern(
    key: str, pattern: dict[str, float], linear: dict[str, nn.Module], targets: str | list[str]
) -> dict[str, float]:
    """Return a pattern by layer names. Errors: SourceError for a name that matches no layer with LoRA, and
    for a number that is not above 0."""
    adapted = [name for name in linear if _is_target(name, targets)]
    for name, value in pattern.items():
        try:
            matched = any(get_pattern_key([name], layer) == name for layer in adapted)
        except re.error as error:
            raise SourceError(f"model.llm.{key}: '{name}' is no regular expression ({error})") from None
        if not matched:
            ends = ", ".join(dict.fromkeys(layer.rpartition(".")[2] for layer in adapted))
            raise SourceError(f"model.llm.{key}: '{name}' matches no layer with LoRA; those are {ends}")
        if value <= 0:
            raise SourceError(f"model.llm.{key}: {name} is {value:g}: must be above 0")
    return dict(pattern)


def _linear_layers(llm: PreTrainedModel) -> dict[str, nn.Module]:
    """Name -> module of every linear layer but the output embeddings."""
    head = llm.get_output_embeddings()
    return {
        name: module
        for name, module in llm.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head
    }


def _is_target(key: str, targets: str | list[str]) -> bool:
    """Whether peft adapts a module of this name: a string is `all-linear` or a regular expression for the
    whole name, each of a list the whole name or its end."""
    if isinstance(targets, str):
        return targets.lower() == ALL_LINEAR or re.fullmatch(targets, key) is not None
    return any(key == target or key.endswith(f".{target}") for target in targets)


def lora_targets(llm: PreTrainedModel, requested: list[str] | str | None, name: str) -> list[str] | str:
    """Return peft's target_modules for `model.llm.lora_targets`; None: the linear layers of the LLM's
    attention.

    llm: without LoRA, on any device. Errors: SourceError for a target that no linear layer matches, and for
    None where the LLM has no attention.
    """
    if requested is None:
        return _attention_targets(llm, name)
    if isinstance(requested, list) and [one.lower() for one in requested] == [ALL_LINEAR]:
        requested = ALL_LINEAR
    linear = _linear_layers(llm)
    layer_names = list(dict.fromkeys(key.rpartition(".")[2] for key in linear))
    if isinstance(requested, str):
        if not any(_is_target(key, requested) for key in linear):
            hint = f"; a list of names is written [{requested}]" if requested in layer_names else ""
            raise SourceError(
                f"model.llm.lora_targets: no linear layer of {name} has a whole name that the regular "
                f"expression "
                f"'{requested}' matches, such as '{next(iter(linear))}'{hint}; its linear layers: "
                f"{', '.join(layer_names)}"
            )
        others = [
            key
            for key, module in llm.named_modules()
            if requested.lower() != ALL_LINEAR and _is_target(key, requested) and key not in linear
        ]
    else:
        for target in requested:
            if not any(_is_target(key, [target]) for key in linear):
                near = either(near_names(target, layer_names, cutoff=0.0))
                raise SourceError(
                    f"model.llm.lora_targets: {name} has no linear layer '{target}'; did you mean {near}? "
                    f"Its linear layers: {', '.join(layer_names)}"
                )
        others = [key for key, _ in llm.named_modules() if _is_target(key, requested) and key not in linear]
    if others:
        raise SourceError(
            f"model.llm.lora_targets: '{others[0]}' of {name} is no linear layer inside the LLM, and LoRA is "
            f"for "
            "those: "
            f"{', '.join(layer_names)}"
        )
    return requested


def resolved_targets(config: LLMConfig, source: Source) -> list[str] | str | None:
    """`config.lora_targets`; for None the LLM's attention layers, from its config.json alone. Errors:
    SourceError."""
    if config.lora_r == 0 or config.lora_targets is not None and not config.lora_modules_to_save:
        return config.lora_targets
    with torch.device("meta"):
        llm = causal_lm_class(source.config)(source.config)
    saved_modules(llm, config, source.name)  # what does not fit is an error before weights are read
    if config.lora_targets is not None:
        return config.lora_targets
    return lora_targets(llm, None, source.name)


def _attention_targets(llm: PreTrainedModel, name: str) -> list[str] | str:
    """The linear layers inside the text decoder's attention modules: the shortest ends of their names that
    mean no others, or a regular expression where these ends hold a layer's number (beside a vision tower with
    layers of the same names)."""
    linear, decoder = _linear_layers(llm), llm.get_decoder()
    inside = {id(module) for module in decoder.modules()}
    modules = dict(llm.named_modules())
    # A multimodal LLM's vision and audio towers have attention too; their configurations name other sizes.
    own = (llm.config.model_type, llm.config.get_text_config().model_type)
    towers = [
        key
        for key, module in modules.items()
        if key and getattr(getattr(module, "config", None), "model_type", own[0]) not in own
    ]
    attends = []
    for key in linear:
        parents = [key[: end.start()] for end in re.finditer(r"\.", key)]
        if any(_ATTENTION.search(type(modules[parent]).__name__) for parent in parents) and not any(
            key.startswith(f"{tower}.") for tower in towers
        ):
            attends.append(key)
    chosen = [
        key for key in attends if id(linear[key]) in inside
    ] or attends  # what some call their decoder is a head
    if not chosen:
        layer_names = list(dict.fromkeys(key.rpartition(".")[2] for key in linear))
        raise SourceError(
            f"{name} has no attention layers that model.llm.lora_targets: null could mean: name linear "
            "layers, or "
            f"write all-linear; its linear layers: {', '.join(layer_names)}"
        )
    others = [key for key in linear if key not in set(chosen)]
    targets: list[str] = []
    for key in chosen:
        if _is_target(key, targets):
            continue
        words = key.split(".")
        ends = (".".join(words[-length:]) for length in range(1, len(words) + 1))
        targets.append(next(end for end in ends if not any(_is_target(other, [end]) for other in others)))
    if not any(re.search(r"(^|\.)\d+\.", target) for target in targets):
        return targets
    pattern = "|".join(
        dict.fromkeys(re.sub(r"\\\.\d+(?=\\\.)", r"\\.\\d+", re.escape(key)) for key in chosen)
    )
    return targets if any(_is_target(other, pattern) for other in others) else pattern


def described_targets(llm: LLM) -> str:
    """Which layers of the LLM have LoRA, for people: "q_proj x 32, v_proj x 32"."""
    counts = Counter(
        name.removesuffix(".lora_A.default.weight").rpartition(".")[2]
        for name, _ in llm.named_parameters()
        if name.endswith(".lora_A.default.weight")
    )
    return ", ".join(f"{name} x {count}" for name, count in counts.items())


def end_settings(source: Source) -> GenerationConfig:
    """Return all that is taken from an LLM's own generation settings: the ids that begin, end and pad a text.

    Whatever else they hold (n-grams that must not repeat, suppressed words, a time limit ...) would change
    answers and differ between a run and its export: the settings of generation are this project's
    (model/generation/greedy.py). Errors: SourceError.
    """
    file = None if source.folder is None else source.folder / "generation_config.json"
    if file is None or not file.exists():
        base = GenerationConfig.from_model_config(source.config)
    else:
        try:
            base = GenerationConfig.from_pretrained(file.parent)
        except (OSError, ValueError, TypeError) as error:
            raise SourceError(
                f"{file} cannot be read ({one_line(error)}): save it again or remove it"
            ) from None
    return GenerationConfig(
        bos_token_id=base.bos_token_id, eos_token_id=base.eos_token_id, pad_token_id=base.pad_token_id
    )


def end_ids(tokenizer: PreTrainedTokenizerBase, style: str, settings: GenerationConfig) -> list[int]:
    """Return the ids that end an answer: those of the chat template's turn and the tokenizer, and those of
    `end_settings`."""
    configured = settings.eos_token_id
    configured = configured if isinstance(configured, list) else [configured]
    stop = stop_ids(tokenizer, style)
    return stop + [i for i in configured if i is not None and i not in stop]


def context_length(config: PretrainedConfig) -> int | None:
    """Return the positions that an LLM is made for; None where its configuration does not say."""
    sizes = text_config(config)
    longest = getattr(sizes, "max_position_embeddings", None)
    rope = getattr(sizes, "rope_parameters", None) or {}
    if (
        longest
        and rope.get("rope_type") in ("yarn", "longrope")
        and rope.get("original_max_position_embeddings")
    ):
        longest = max(longest, int(rope["original_max_position_embeddings"] * (rope.get("factor") or 1)))
    return longest


def base_of(llm: LLM) -> PreTrainedModel:
    """The transformers model, with or without LoRA around it."""
    return cast(PreTrainedModel, llm.get_base_model()) if isinstance(llm, PeftModel) else llm


def lora_parameters(llm: LLM) -> list[tuple[str, nn.Parameter]]:
    """Return what is trained beside the frozen LLM: LoRA, and copies of whole layers."""
    return [(name, p) for name, p in llm.named_parameters() if is_lora(name)]


def is_lora(name: str) -> bool:
    """Whether a parameter of this name is LoRA's, or of a layer that is trained whole beside it."""
    return "lora_" in name or MARK in name


def embed(llm: LLM, input_ids: torch.Tensor, audio_id: int) -> torch.Tensor:
    """input_ids [B, L] -> embeddings [B, L, D]; the audio token, which may lie beyond the table, reads row
    0."""
    return base_of(llm).get_input_embeddings()(input_ids.masked_fill(input_ids == audio_id, 0))


CHUNK_LOGITS = 1 << 24  # logits that exist at once: 64 MiB in fp32


class HeadCrossEntropy(torch.autograd.Function):
    """hidden [N, D], weight [V, D] (frozen), targets [N] -> cross-entropy of hidden x weight^T summed over N,
    in fp32.

    A chunk of positions at a time: its logits become its loss and, at once, the gradient of its hidden
    states, so that neither N x |V| numbers nor the weight are kept for backward (ZeRO-3 has released it by
    then). The arithmetic is that of `F.cross_entropy((hidden @ weight.T).float(), targets)`. torch's own
    `F.linear_cross_entropy` does the same, but returns the sum over bf16 inputs in bf16: 2 to 3 digits of a
    sum over thousands of tokens.
    """

    @staticmethod
    def forward(ctx, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        rows = max(1, CHUNK_LOGITS // weight.shape[0])
        for start in range(0, len(hidden), rows):
            at = slice(start, start + rows)
            logits = (hidden[at] @ weight.t()).float()
            lse = logits.logsumexp(1)
            loss += (lse - logits.gather(1, targets[at, None])[:, 0]).sum()
            if gradient is not None:
                logits.sub_(lse[:, None]).exp_()
                logits.scatter_add_(1, targets[at, None], logits.new_full((len(logits), 1), -1.0))
                gradient[at] = logits.to(weight.dtype) @ weight
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx, of_loss: torch.Tensor):
        return ctx.saved_tensors[0] * of_loss.to(ctx.saved_tensors[0].dtype), None, None


# Lengths of a row beyond which an LLM computes otherwise, or not at all, as configs name them.
ROW_LIMITS = ("max_position_embeddings", "attention_chunk_size", "floor_scale")


def one_row_is_cheaper(llm: LLM, mask: torch.Tensor, width: int) -> bool:
    """Whether the rows of a batch, mask [B, L], cost a model of this width less joined to one row without
    padding.

    A token costs a layer about 24 D^2 operations in its products and 4 D for each position that attention
    computes; in one row those are all N tokens of the batch (block-diagonal, but computed), unless
    FlashAttention runs, which skips other rows. Rows joined are no longer than a row may be by the LLM's
    config: some models count there by place, whatever the positions say.
    """
    (rows, length), tokens, config = mask.shape, int(mask.sum()), base_of(llm).config
    if tokens > min(
        (limit for name in ROW_LIMITS if (limit := getattr(config.get_text_config(), name, None))),
        default=tokens,
    ):
        return False
    if "flash" in (config._attn_implementation or ""):
        return tokens > 0
    return 0 < tokens * (6 * width + tokens) < rows * length * (6 * width + length)


class Arranged(NamedTuple):
    """A batch's rows as the LLM gets them: as they are, [B, L] with padding, or joined to one row [1, N]
    without."""

    arguments: dict[str, torch.Tensor]  # of the LLM's forward
    labels: torch.Tensor
    keys: torch.Tensor | None  # of dropout, one a token


def arrange(
    embeddings: torch.Tensor,
    mask: torch.Tensor,
    labels: torch.Tensor,
    row_keys: torch.Tensor | None,
    joined: bool,
) -> Arranged:
    """embeddings [B, L, D], mask and labels [B, L], row_keys [B] -> the arguments of one forward."""
    keys = None if row_keys is None else position_keys(row_keys, mask.shape[1])
    if not joined:
        return Arranged({"inputs_embeds": embeddings, "attention_mask": mask}, labels, keys)
    is_token = mask.bool()
    labels = labels.masked_fill(
        mask.cumsum(1) == 1, -100
    )  # the row before does not predict a row's first token
    return Arranged(
        {
            "inputs_embeds": embeddings[is_token][None],
            "position_ids": (mask.long().cumsum(1) - 1)[is_token][None],
        },
        labels[is_token][None],
        None if keys is None else keys[is_token][None],
    )


def token_keys_in_use(llm: LLM, keys: torch.Tensor | None) -> AbstractContextManager:
    """Within it LoRA's dropout has these keys."""
    tokens = getattr(llm, "token_keys", None)
    return tokens.use(keys) if tokens is not None else nullcontext()


def target_loss(
    llm: LLM,
    embeddings: torch.Tensor,
    mask: torch.Tensor,
    labels: torch.Tensor,
    row_keys: torch.Tensor | None = None,
    shared: dict | None = None,
) -> torch.Tensor:
    """embeddings [B, L, D], mask [B, L], labels [B, L] (-100: none) -> cross-entropy summed over the target
    tokens. shared: gets `target_hidden`, the hidden states [N, D] in front of the output embeddings at the
    target positions (at least one), for other losses; None where the head does more than multiply.

    row_keys [B]: the rows' keys of dropout, needed where LoRA's is on. Rows are joined to one without padding
    where that is cheaper and `llm.joins_rows` (model/rows.py) allows it; their positions start at 0 again, by
    which transformers keeps them apart in attention. Logits exist only where a label is, and of those a chunk
    at a time: a hook takes the hidden states in front of the output embeddings to the loss, and sends one
    position on through the head and the model's end. A model that does more there than multiply (a bias,
    LoRA, Gemma 2's cap on its logits) is known by its result for that position; it gets all logits at target
    positions. Without any target one position is run and counts nothing.
    """
    joined = getattr(llm, "joins_rows", False) and one_row_is_cheaper(llm, mask, embeddings.shape[-1])
    arguments, arranged_labels, keys = arrange(embeddings, mask, labels, row_keys, joined)
    rows, columns = torch.nonzero(
        arranged_labels[:, 1:] != -100, as_tuple=True
    )  # position i predicts label i + 1
    targets, counts = arranged_labels[rows, columns + 1], 1.0
    if not len(rows):
        rows, columns, targets, counts = rows.new_zeros(1), columns.new_zeros(1), targets.new_zeros(1), 0.0
    head = base_of(llm).get_output_embeddings()
    product = getattr(llm, "head_is_a_product", None)  # None: not known yet
    if product is None and (type(head) is not nn.Linear or head.bias is not None):
        product = cast(Any, llm).head_is_a_product = False
    seen = {}

    def select(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        hidden = inputs[0][rows, columns]
        if shared is not None:
            shared["target_hidden"] = None if product is False else hidden
        if product is False:
            return (hidden.unsqueeze(0),)
        seen["loss"] = HeadCrossEntropy.apply(hidden, module.weight, targets)
        return (hidden[None, :1].detach(),)

    def remember(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        if product is None:
            seen["product"] = output.detach().float().clone()

    handles = head.register_forward_pre_hook(select), head.register_forward_hook(remember)
    try:
        with token_keys_in_use(llm, keys):
            logits = llm(**arguments, use_cache=False).logits  # [1, 1 or N, V]
    finally:
        for handle in handles:
            handle.remove()
    if product is None:
        product = cast(Any, llm).head_is_a_product = torch.allclose(
            seen["product"], logits.float(), rtol=0.0, atol=0.0, equal_nan=True
        )
        if not product:
            return target_loss(llm, embeddings, mask, labels, row_keys, shared)
    if product:
        return counts * seen["loss"]
    return counts * F.cross_entropy(logits[0].float(), targets, reduction="sum")


def splice(
    text: torch.Tensor,
    input_ids: torch.Tensor,
    mask: torch.Tensor,
    labels: torch.Tensor | None,
    audio: torch.Tensor,
    audio_lengths: torch.Tensor,
    audio_id: int,
    *,
    left_padded: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Put the audios in the place of their tokens.

    text [B, L, D] embeddings of input_ids [B, L] under mask [B, L] (padding on either side); audio [A, K, D]
    with lengths [A], in the order of the audio tokens, row by row -> embeddings [B, L', D], mask [B, L'],
    labels [B, L'] (-100 on audio).
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
