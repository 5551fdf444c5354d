"""What a trained network says: batched generation, CTC transcripts, and what there is to see inside."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.utils.rnn import pad_sequence

from model.batch import Batch
from model.features import SAMPLE_RATE, log_mel
from model.joint import CTCPrefixScores, JointScores, JointSearch
from model.language_model import base_of
from model.prompt import chat_ids, stop_ids

if TYPE_CHECKING:
    from transformers.generation.streamers import BaseStreamer

    from model.soundwave import Audio


class Generation:
    """Inference of `Soundwave` (mixed into it)."""

    def prompts(self, chats: list[list[dict[str, str]]], waveforms: list[torch.Tensor] = ()) -> Batch:
        """Chats that are to be continued, as one batch on the model's device.

        chats: lists of {"role", "content"}, with the audio token wherever an audio stands; waveforms: each [S] at 16 kHz, in the
        order of those tokens, chat by chat.
        """
        config = self.config
        ids = [chat_ids(self.tokenizer, chat, config.prompt, config.audio_token, config.system_prompt)[0] for chat in chats]
        rows = [torch.tensor(row, dtype=torch.long) for row in ids]
        input_ids, mask = pad_sequence(rows, batch_first=True), pad_sequence([torch.ones_like(r) for r in rows], batch_first=True)
        sounds = [w.float() for w in waveforms] or [torch.zeros(SAMPLE_RATE // 5)]
        audios = len(sounds)
        batch = Batch(waveforms=pad_sequence(sounds, batch_first=True), features=None,
                      audio_lengths=torch.tensor([len(w) for w in sounds]), audio_is_dummy=not len(waveforms),
                      ctc_targets=torch.zeros(audios, 0, dtype=torch.long),
                      ctc_target_lengths=torch.zeros(audios, dtype=torch.long),
                      has_transcript=torch.zeros(audios, dtype=torch.bool), input_ids=input_ids, attention_mask=mask,
                      labels=torch.full_like(input_ids, -100), ids=[f"chat {i}" for i in range(len(chats))])
        return batch.to(next(self.parameters()).device)

    def answer(self, chats: list[list[dict[str, str]]], waveforms: list[torch.Tensor] = (), **options) -> list[str]:
        """The next turn of each chat, as text: `prompts`, then `generate` with its options."""
        ids = self.generate(self.prompts(chats, waveforms), **options)
        return self.tokenizer.batch_decode(ids, skip_special_tokens=True)

    @torch.no_grad()
    def generate(self, batch: Batch, *, max_new_tokens: int = 512, do_sample: bool = False, temperature: float = 0.2,
                 top_p: float = 0.9, min_new_tokens: int = 0, streamer: "BaseStreamer | None" = None,
                 synced_gpus: bool = False, joint: JointSearch | None = None) -> list[list[int]]:
        """Answers as token ids, one list per conversation, without the end of turn.

        batch: prompts that end with the assistant's opening (`prompt.chat_ids` of a chat without its answer), padded on either
        side, with any number of audios anywhere, or none. temperature and top_p count with do_sample (the values are the
        release's). streamer: transformers' TextStreamer or TextIteratorStreamer, for one conversation. synced_gpus: under
        ZeRO-3 every rank decodes until the last one has finished. joint: search the answers together with the CTC head (for
        transcripts; model/joint.py), without sampling or streamer.
        """
        if self.llm is None:
            raise ValueError("this model has no LLM (stage I): use ctc_greedy")
        if joint is not None and (do_sample or streamer is not None):
            raise ValueError("joint decoding is a beam search: no do_sample, no streamer")
        training = self.training
        self.eval()
        audio = self.listen(batch)
        embeddings, mask, _ = self.embeddings(batch, audio, left_padded=True)
        stop = stop_ids(self.tokenizer, self.config.prompt)
        configured = base_of(self.llm).generation_config.eos_token_id
        stop += [i for i in (configured if isinstance(configured, list) else [configured]) if i is not None and i not in stop]
        sampling = {"temperature": temperature, "top_p": top_p, "top_k": 0} if do_sample else {
            "temperature": None, "top_p": None, "top_k": None}
        beams, searched = {"num_beams": 1}, None
        if joint is not None:
            searched = JointScores(self.tokenizer, self.ctc_scores(batch, audio), joint, stop, max_new_tokens)
            # Sums are compared, not means: the CTC term knows when all has been said.
            beams = {"num_beams": joint.beams, "length_penalty": 0.0, "logits_processor": [searched]}
        ids = self.llm.generate(inputs_embeds=embeddings, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=do_sample,
                                eos_token_id=stop, pad_token_id=stop[0], streamer=streamer, synced_gpus=synced_gpus,
                                min_new_tokens=min_new_tokens or None, use_cache=True, repetition_penalty=1.0, **beams,
                                **sampling)
        self.train(training)
        answers = []
        for place, row in enumerate(ids.tolist()):
            end = next((i for i, token in enumerate(row) if token in stop), len(row))
            answers.append(row[:end] if searched is None or searched.ctc[place] is None else searched.best[place][1])
        return answers

    def ctc_scores(self, batch: Batch, audio: Audio) -> list[CTCPrefixScores | None]:
        """The CTC head's scores of token sequences, for each conversation of a batch with exactly one audio."""
        counts = (batch.attention_mask.bool() & (batch.input_ids == self.audio_id)).sum(dim=1).tolist()
        scores, place = [], 0
        for count in counts:
            hidden = audio.hidden[place, :audio.lengths[place]] if count == 1 else None
            scores.append(None if hidden is None else CTCPrefixScores(self.ctc_head.log_probs(hidden).cpu().numpy(),
                                                                      self.ctc_head.blank))
            place += count
        return scores

    @torch.no_grad()
    def ctc_greedy(self, batch: Batch) -> list[str]:
        """The CTC head's own transcript of each audio: the argmax tokens, runs collapsed, blanks dropped."""
        training = self.training
        self.eval()
        audio = self.listen(batch)
        self.train(training)
        texts = []
        for argmax, length in zip(audio.argmax.cpu(), audio.lengths.tolist()):
            tokens = torch.unique_consecutive(argmax[:length])
            tokens = tokens[(tokens != self.ctc_head.blank) & (tokens < len(self.tokenizer))]
            texts.append(self.tokenizer.decode(tokens.tolist(), skip_special_tokens=True).strip())
        return texts

    @torch.no_grad()
    def inspect(self, batch: Batch) -> dict[str, list]:
        """What happens to each audio, for pictures; one entry per audio under each key:

        mel [n_mels, F] (None for cached features), seconds, tokens [T] (argmax ids of the CTC head; `blank` is its blank),
        blank_probability [T], peak [T] (log-probability of the argmax), kept [K] (frame positions); and frame_rate, the
        adapter's frames per second, and blank, as plain numbers.
        """
        training = self.training
        self.eval()
        audio = self.listen(batch)
        self.train(training)
        encoder_rate = self.encoder.frame_rate if self.encoder is not None else 50.0
        rate = encoder_rate / self.config.alignment.stack_frames
        seen: dict[str, list] = {"mel": [], "seconds": [], "tokens": [], "blank_probability": [], "peak": [], "kept": []}
        for i, (length, kept) in enumerate(zip(audio.lengths.tolist(), audio.kept_lengths.tolist())):
            mel = None
            if batch.waveforms is not None:
                size = batch.audio_lengths[i:i + 1]
                mel = log_mel(batch.waveforms[i:i + 1, :int(size)], size, 80)[0][0].cpu()
            seen["mel"].append(mel)
            seen["seconds"].append(length / rate)
            seen["tokens"].append(audio.argmax[i, :length].cpu())
            seen["blank_probability"].append(audio.blank_logprob[i, :length].float().exp().cpu())
            seen["peak"].append(audio.peak[i, :length].float().cpu())
            seen["kept"].append(audio.kept[i, :kept].cpu())
        return {**seen, "frame_rate": rate, "blank": self.ctc_head.blank}
