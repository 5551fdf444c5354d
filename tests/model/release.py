"""The authors' network, written plainly from the description in docs/method.md, with the official
checkpoint's tensor names.

An oracle for tests: one utterance at a time, stock PyTorch layers, every logit materialised. It runs under
transformers 4.43 and 5.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

THEIRS = ("adapter_size", "audio_tower", "audio_patch_size", "audio_patch_token", "llm_pad_token_id")


class LookBack(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.encoder_attn = nn.MultiheadAttention(width, heads, dropout=0.1, batch_first=True)
        self.atten_layer_norm = nn.LayerNorm(width)


class ReleasedSoundwave(nn.Module):
    def __init__(self, config: dict, encoder_config: dict):
        super().__init__()
        llama = LlamaConfig(
            **{k: v for k, v in config.items() if k not in (*THEIRS, "model_type", "transformers_version")}
        )
        llama._attn_implementation = "eager"
        whisper = WhisperConfig(**encoder_config)
        whisper._attn_implementation = "eager"
        causal = LlamaForCausalLM(llama)
        self.config, self.model, self.lm_head = config, causal.model, causal.lm_head
        width, heads = llama.hidden_size, llama.num_attention_heads
        self.model.audio_tower = WhisperEncoder(whisper)
        self.model.mm_projector1 = nn.Linear(2 * config["adapter_size"], width)
        layer = nn.TransformerEncoderLayer(
            width, heads, 2 * width, 0.1, norm_first=True
        )  # its default: time comes first
        self.model.asr_transformer_encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.model.out_norm = nn.LayerNorm(width)
        self.model.audio_feature_head = nn.Linear(width, llama.vocab_size, bias=False)
        self.model.lbm = LookBack(width, heads)

    @classmethod
    def random(cls, config: dict, encoder_config: dict, seed: int = 0) -> ReleasedSoundwave:
        torch.manual_seed(seed)
        model = cls(config, encoder_config).eval()
        for name, parameter in model.named_parameters():
            parameter.data.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.2)
        return model

    @classmethod
    def load(cls, folder: Path) -> ReleasedSoundwave:
        """Strictly: every tensor of the folder has its place, every parameter its tensor."""
        from safetensors.torch import load_file

        model = cls(
            *(json.loads((folder / path).read_text()) for path in ("config.json", "encoder/config.json"))
        )
        state = {}
        for file in sorted(folder.glob("model*.safetensors")):
            state.update(load_file(file))
        model.load_state_dict(state, strict=True)
        return model.float().eval()

    def hear(self, mel: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """One utterance's mel [n_mels, 3000] -> hidden [750, D], CTC logits [750, V]."""
        net = self.model
        features = net.audio_tower(mel[None]).last_hidden_state
        stacked = features.reshape(1, features.shape[1] // 2, -1)
        hidden = net.out_norm(net.asr_transformer_encoder(net.mm_projector1(stacked)))[0]
        return hidden, net.audio_feature_head(hidden)

    def shrink(self, hidden: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        tokens = logits.argmax(-1).tolist()
        first = torch.tensor([i == 0 or tokens[i] != tokens[i - 1] for i in range(len(tokens))])
        kept = hidden[first]
        mixed, _ = self.model.lbm.encoder_attn(
            kept[None], hidden[None], hidden[None], key_padding_mask=~first[None]
        )
        return self.model.lbm.atten_layer_norm(kept + mixed[0])

    def spliced(
        self, input_ids: torch.Tensor, mel: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, int, torch.Tensor]:
        """input_ids [L] with one audio token -> embeddings [L', D], CTC logits, the audio's position, its
        CTC peaks."""
        hidden, ctc = self.hear(mel)
        audio = self.shrink(hidden, ctc)
        at = int((input_ids == self.config["audio_patch_token"]).nonzero()[0])
        text = self.model.embed_tokens(input_ids)
        return torch.cat([text[:at], audio, text[at + 1 :]]), ctc, at, audio

    @torch.no_grad()
    def logits(self, input_ids: torch.Tensor, mel: torch.Tensor) -> torch.Tensor:
        """One conversation: input_ids [L], mel [n_mels, 3000] -> logits [L', V]."""
        embeddings = self.spliced(input_ids, mel)[0]
        return self.lm_head(self.model(inputs_embeds=embeddings[None]).last_hidden_state)[0]

    @torch.no_grad()
    def losses(
        self, input_ids: torch.Tensor, labels: torch.Tensor, mel: torch.Tensor, targets: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A padded batch (labels and targets -100 where none) -> cross-entropy, CTC, both means as the
        authors' code takes them."""
        predicted, wanted, ctc = [], [], []
        for ids, label, sound, target in zip(input_ids, labels, mel, targets, strict=True):
            real = ids != self.config["llm_pad_token_id"]
            ids, label = ids[real], label[real]
            embeddings, ctc_logits, at, audio = self.spliced(ids, sound)
            logits = self.lm_head(self.model(inputs_embeds=embeddings[None]).last_hidden_state)[0]
            moved = torch.cat([label[:at], label.new_full((len(audio),), -100), label[at + 1 :]])
            predicted.append(logits[:-1])
            wanted.append(moved[1:])
            target = target[target != -100]
            loss = F.ctc_loss(
                ctc_logits.log_softmax(-1),
                target,
                torch.tensor(len(ctc_logits)),
                torch.tensor(len(target)),
                blank=self.config["audio_patch_token"],
                reduction="sum",
                zero_infinity=True,
            )
            ctc.append(loss / len(target))
        return F.cross_entropy(torch.cat(predicted), torch.cat(wanted), ignore_index=-100), torch.stack(
            ctc
        ).mean()
