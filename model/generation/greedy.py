"""What a trained network says: batched generation, CTC transcripts, and what there is to see inside."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, LogitNormalization, LogitsProcessorList

from model.batch import Batch
from model.features import SAMPLE_RATE, log_mel
from model.generation import drafted as drafting
from model.generation import running
from model.generation.joint import CTCPrefixScores, JointScores, JointSearch
from model.language_model import LLM, base_of, context_length, end_ids
from model.prompt import audio_count, chat_ids
from model.waveforms import SoundWarning, Waveform, usable_clips

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from transformers.generation.streamers import BaseStreamer

    from model.alignment import CTCHead
    from model.config import SoundwaveConfig
    from model.encoder import Encoder
    from model.soundwave import Audio


MAX_NEW_TOKENS = 512
logger = logging.getLogger("soundwave")


class Generation(nn.Module):
    """Inference of `Soundwave`, which has the network and these attributes."""

    config: SoundwaveConfig
    tokenizer: PreTrainedTokenizerBase
    audio_id: int
    encoder: Encoder | None
    ctc_head: CTCHead
    llm: LLM | None
    trained_seconds: float | None  # longest clip of training, where a model folder records it
    unanswered: dict[int, str]  # rows of the last batch beyond the LLM's context, and why

    if TYPE_CHECKING:

        def encode_audio(self, batch: Batch) -> Audio: ...

        def embeddings(
            self, batch: Batch, audio: Audio, left_padded: bool = False
        ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]: ...

    drafted_passes: drafting.Passes | None = None  # of the last batch, where its answers were drafted
    _spelling: drafting.Spelling | None = None
    _draft_refusals: set[str] = set()

    def prompts(
        self,
        chats: list[list[dict[str, str]]],
        waveforms: Sequence[Waveform] = (),
        *,
        sampling_rate: int = SAMPLE_RATE,
    ) -> Batch:
        """Return chats that are to be continued, as one batch on the model's device.

        chats: lists of {"role", "content"}, with the audio token wherever an audio stands; waveforms: in the
        order of those tokens, chat by chat, each a tensor or array of `model.waveforms.mono` at
        `sampling_rate`. A clip that cannot be used (no samples, NaN) is named in a SoundWarning and taken as
        silence. Errors: ValueError, also where no clip can be used; PromptError.
        """
        return self._prompts(chats, waveforms, sampling_rate)[0]

    def _prompts(
        self, chats: list[list[dict[str, str]]], waveforms: Sequence[Waveform], sampling_rate: int
    ) -> tuple[Batch, list[int]]:
        """The batch, and the chats whose audio cannot be used."""
        config = self.config
        ids = [
            chat_ids(self.tokenizer, chat, config.prompt, config.audio_token, config.system_prompt)[0]
            for chat in chats
        ]
        owners = [
            place for place, chat in enumerate(chats) for _ in range(audio_count(chat, config.audio_token))
        ]
        if len(owners) != len(waveforms):
            raise ValueError(
                f"{len(waveforms)} waveforms for {len(owners)} {config.audio_token} in the chats: give one "
                f"for each"
            )
        clips, unusable = usable_clips(waveforms, sampling_rate)
        longest = config.encoder.max_seconds
        for number, clip in enumerate(clips):
            seconds = len(clip) / SAMPLE_RATE
            if seconds > longest:
                raise ValueError(
                    f"waveform {number} lasts {seconds:.1f} s, this model takes {longest:g} s at most "
                    "(model.encoder.max_seconds): cut it"
                )
            if warning := self.length_warning(seconds):
                warnings.warn(f"waveform {number} {warning}", SoundWarning, stacklevel=3)
        rows = [torch.tensor(row, dtype=torch.long) for row in ids]
        input_ids = pad_sequence(rows, batch_first=True)
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        clips = clips or [torch.zeros(SAMPLE_RATE // 5)]
        audios = len(clips)
        batch = Batch(
            waveforms=pad_sequence(clips, batch_first=True),
            features=None,
            audio_lengths=torch.tensor([len(clip) for clip in clips]),
            audio_is_dummy=not len(waveforms),
            ctc_targets=torch.zeros(audios, 0, dtype=torch.long),
            ctc_target_lengths=torch.zeros(audios, dtype=torch.long),
            has_transcript=torch.zeros(audios, dtype=torch.bool),
            input_ids=input_ids,
            attention_mask=mask,
            labels=torch.full_like(input_ids, -100),
            ids=[f"chat {i}" for i in range(len(chats))],
        )
        return batch.to(next(self.parameters()).device), sorted({owners[number] for number in unusable})

    def length_warning(self, seconds: float) -> str | None:
        """Return a warning for a clip longer than those that the model was trained on; None for other
        clips."""
        if self.trained_seconds is None or seconds <= 1.01 * self.trained_seconds:
            return None
        return (
            f"lasts {seconds:.1f} s, the model was trained on clips of at most {self.trained_seconds:g} s "
            "(data.max_seconds): its answer may be wrong or stop early; cut the audio"
        )

    def answer(
        self,
        chats: list[list[dict[str, str]]],
        waveforms: Sequence[Waveform] = (),
        *,
        sampling_rate: int = SAMPLE_RATE,
        **options,
    ) -> list[str]:
        """Return the next turn of each chat, as text: `prompts`, then `generate` with its options.

        A chat whose audio cannot be used, or that does not fit into the LLM's context, is answered by "" and
        named in a SoundWarning; the others are answered as without it. Errors: ValueError where none can be
        answered.
        """
        batch, unusable = self._prompts(chats, waveforms, sampling_rate)
        texts = self.tokenizer.batch_decode(self.generate(batch, **options), skip_special_tokens=True)
        if len(self.unanswered) == len(chats):
            raise ValueError("; ".join(self.unanswered.values()))
        return ["" if place in unusable else text for place, text in enumerate(texts)]

    @torch.no_grad()
    def generate(
        self,
        batch: Batch,
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
        do_sample: bool = False,
        temperature: float = 0.2,
        top_p: float = 0.9,
        min_new_tokens: int = 0,
        streamer: BaseStreamer | None = None,
        synced_gpus: bool = False,
        joint: JointSearch | None = None,
        drafted: drafting.Drafting | None = None,
        audio: Audio | None = None,
    ) -> list[list[int]]:
        """Return answers as token ids, one list per conversation, without the end of turn.

        batch: prompts that end with the assistant's opening (`prompt.chat_ids` of a chat without its
        answer), padded on either side, with any number of audios anywhere, or none. temperature and top_p
        count with do_sample (defaults: the authors' code). streamer: transformers' TextStreamer or
        TextIteratorStreamer, for one conversation. synced_gpus: under ZeRO-3 every rank decodes until the
        last one has finished. joint: search the answers together with the CTC head (for transcripts;
        model/generation/joint.py), without sampling or streamer. drafted: let the LLM check the CTC head's
        transcript, several tokens in one pass (model/generation/drafted.py): the tokens of greedy decoding,
        in fewer passes, which `drafted_passes` counts. audio: what `encode_audio` gives for this batch, where
        the caller has it.

        Of the LLM's own generation settings only the ids that end a text count (language_model.end_settings);
        all others are those given here. A conversation beyond the LLM's context is answered by nothing and
        named in `unanswered` and a SoundWarning.
        """
        if self.llm is None:
            raise ValueError("this model has no LLM (stage 1): use ctc_greedy")
        if joint is not None and (do_sample or streamer is not None):
            raise ValueError("joint decoding is a beam search: no do_sample, no streamer")
        if drafted is not None and (do_sample or joint is not None):
            raise ValueError("drafted decoding is greedy: no do_sample, no joint")
        training = self.training
        self.eval()
        audio = self.encode_audio(batch) if audio is None else audio
        embeddings, mask, _ = self.embeddings(batch, audio, left_padded=True)
        base, longest = base_of(self.llm), self._fit(mask)
        stop = end_ids(self.tokenizer, self.config.prompt, base.generation_config)
        if (
            longest is None and not synced_gpus
        ):  # nothing fits; under ZeRO-3 the other ranks wait for this one's part
            if streamer is not None:
                streamer.end()
            self.train(training)
            return [[] for _ in mask]
        embeddings, mask = (part[:, -(longest or 1) :] for part in (embeddings, mask))
        settings = GenerationConfig(
            max_new_tokens=self.answer_room(longest or 1, max_new_tokens),
            min_new_tokens=min_new_tokens or None,
            do_sample=do_sample,
            eos_token_id=stop,
            pad_token_id=stop[0],
            use_cache=True,
        )
        self.drafted_passes = None
        if drafted is not None and self._can_draft(self.llm, drafted, longest, settings, synced_gpus):
            limits = running.Limits(stop, min_new_tokens, settings.max_new_tokens)
            answers, self.drafted_passes = running.decode(
                self.llm,
                self.audio_id,
                embeddings,
                mask,
                self._drafts(self.llm, batch, audio, drafted, stop),
                limits,
                drafted.minimum_ratio,
                streamer,
            )
            self.train(training)
            return self._answers(answers, stop)
        processors, searched = LogitsProcessorList(), None
        if do_sample:
            settings.update(temperature=temperature, top_p=top_p, top_k=0)
        if joint is not None:
            searched = JointScores(
                self.tokenizer, self.ctc_scores(batch, audio), joint, stop, settings.max_new_tokens
            )
            # Sums are compared, not means: the CTC term knows when all has been said.
            if joint.beams > 1:
                settings.update(num_beams=joint.beams, length_penalty=0.0)
            else:  # transformers' beam search hands log-probabilities over, its greedy search logits
                processors.append(LogitNormalization())
            processors.append(searched)
        network: Any = self.llm  # a GenerationMixin too, with or without LoRA
        ids = network.generate(
            inputs_embeds=embeddings,
            attention_mask=mask,
            generation_config=settings,
            streamer=streamer,
            synced_gpus=synced_gpus,
            logits_processor=processors,
        )
        self.train(training)
        answers = ids.tolist()
        if searched is not None:
            for place, (ctc, best) in enumerate(zip(searched.ctc, searched.best, strict=True)):
                answers[place] = answers[place] if ctc is None else best[1]
        return self._answers(answers, stop)

    def _answers(self, rows: list[list[int]], stop: list[int]) -> list[list[int]]:
        """Cut each answer at its end of turn; conversations beyond the LLM's context have none."""
        answers = []
        for place, row in enumerate(rows):
            end = next((i for i, token in enumerate(row) if token in stop), len(row))
            answers.append([] if place in self.unanswered else row[:end])
        return answers

    def _can_draft(
        self,
        llm: LLM,
        drafted: drafting.Drafting,
        longest: int | None,
        settings: GenerationConfig,
        synced_gpus: bool,
    ) -> bool:
        """Whether answers can be drafted; why not is logged once."""
        positions = (longest or 1) + settings.max_new_tokens
        why = drafting.refusal(llm, positions, drafted.longest)
        if synced_gpus:
            why = "under ZeRO-3 every rank has to run as many passes"
        if why is not None and why not in self._draft_refusals:
            self._draft_refusals.add(why)
            logger.warning("drafted decoding falls back to greedy: %s", why)
        return why is None

    def _drafts(
        self, llm: LLM, batch: Batch, audio: Audio, drafted: drafting.Drafting, stop: list[int]
    ) -> list[drafting.Draft]:
        """The CTC transcripts of each conversation's audios, as drafts of its answer."""
        if self._spelling is None or self._spelling.stop != stop:
            rows = cast(torch.Tensor, base_of(llm).get_input_embeddings().weight).shape[0]
            self._spelling = drafting.Spelling(self.tokenizer, stop, rows)
        counts = (batch.attention_mask.bool() & (batch.input_ids == self.audio_id)).sum(dim=1).tolist()
        transcripts = iter(self._ctc_tokens(audio))
        drafts = []
        for count in counts:
            tokens = [token for _ in range(count) for token in next(transcripts)]
            drafts.append(drafting.Draft(self._spelling, self._spelling.draft(tokens), drafted.longest))
        return drafts

    def _ctc_tokens(self, audio: Audio) -> list[list[int]]:
        """The CTC head's greedy transcript of each audio: argmax tokens, runs collapsed, blanks dropped."""
        transcripts = []
        for argmax, length in zip(audio.argmax.cpu(), audio.lengths.tolist(), strict=False):
            tokens = torch.unique_consecutive(argmax[:length])
            kept = tokens[(tokens != self.ctc_head.blank) & (tokens < len(self.tokenizer))]
            transcripts.append(kept.tolist())
        return transcripts

    def draft_refusal(self, positions: int) -> str | None:
        """Return why conversations of `positions` positions, answer included, cannot be drafted or `join` a
        running batch; None where they can."""
        if self.llm is None:
            return "this model has no LLM"
        return drafting.refusal(self.llm, positions, drafting.Drafting().longest)

    @torch.no_grad()
    def join(
        self,
        answering: running.RunningBatch,
        batch: Batch,
        audio: Audio,
        places: list[int],
        max_new_tokens: list[int],
        choices: list[running.Choice | None],
    ) -> dict[int, running.Row]:
        """Add conversations of a batch to those that are being answered; return their rows by place.

        places: which conversations. max_new_tokens and choices: of each conversation of the batch; choices
        as of `running.Row`, None for the tokens of greedy decoding. Conversations beyond the LLM's context
        are named in `unanswered` and have no row.
        """
        llm = answering.llm
        embeddings, mask, _ = self.embeddings(batch, audio, left_padded=True)
        self._fit(mask)
        places = [place for place in places if place not in self.unanswered]
        if not places:
            return {}
        stop = end_ids(self.tokenizer, self.config.prompt, base_of(llm).generation_config)
        drafts = self._drafts(llm, batch, audio, drafting.Drafting(), stop)
        taken = mask.sum(1).tolist()
        rows = {
            place: running.Row(
                running.Limits(stop, 0, self.answer_room(taken[place], max_new_tokens[place])),
                drafts[place] if choices[place] is None else None,
                choices[place],
            )
            for place in places
        }
        longest = max(taken[place] for place in places)
        answering.join(list(rows.values()), embeddings[places, -longest:], mask[places, -longest:])
        return rows

    def prompt_embeddings(self, batch: Batch, audio: Audio) -> list[torch.Tensor]:
        """Return what the LLM reads of each conversation, [L, D] each, for an LLM elsewhere. Conversations
        beyond the LLM's context are named in `unanswered`."""
        embeddings, mask, _ = self.embeddings(batch, audio, left_padded=True)
        self._fit(mask)
        return [row[counts.bool()] for row, counts in zip(embeddings, mask, strict=True)]

    def _context(self) -> int | None:
        """Return the positions that the LLM takes; None where that is not known."""
        return None if self.llm is None else context_length(base_of(self.llm).config)

    def _fit(self, mask: torch.Tensor) -> int | None:
        """Return the positions that the longest conversation takes among those that fit into the LLM's
        context, None where none does; those that do not are named in `unanswered`. mask [B, L]: of the
        prompts, audio included."""
        context, taken = self._context(), mask.sum(1).tolist()
        full = [place for place, count in enumerate(taken) if context is not None and count >= context]
        self.unanswered = {
            place: f"conversation {place} takes {taken[place]} positions, audio included, and the LLM's context "  # noqa: E501
            f"has {context}: cut its audio or its text"
            for place in full
        }
        for text in self.unanswered.values():
            warnings.warn(text, SoundWarning, stacklevel=4)
        return max((count for place, count in enumerate(taken) if place not in self.unanswered), default=None)

    def answer_room(self, longest: int, max_new_tokens: int) -> int:
        """Return how many tokens the answers of a batch may have beside a prompt of `longest` positions."""
        context = self._context()
        if context is None or longest + max_new_tokens <= context:
            return max_new_tokens
        warnings.warn(
            f"answers of this batch end after {context - longest} tokens: the LLM's context of {context} "
            f"positions is "
            "full then",
            SoundWarning,
            stacklevel=4,
        )
        return context - longest

    def ctc_scores(self, batch: Batch, audio: Audio) -> list[CTCPrefixScores | None]:
        """The CTC head's scores of token sequences, for each conversation of a batch with exactly one
        audio."""
        counts = (batch.attention_mask.bool() & (batch.input_ids == self.audio_id)).sum(dim=1).tolist()
        scores, place = [], 0
        for count in counts:
            hidden = audio.hidden[place, : audio.lengths[place]] if count == 1 else None
            scores.append(
                None
                if hidden is None
                else CTCPrefixScores(self.ctc_head.log_probs(hidden).cpu().numpy(), self.ctc_head.blank)
            )
            place += count
        return scores

    @torch.no_grad()
    def ctc_greedy(self, batch: Batch, audio: Audio | None = None) -> list[str]:
        """The CTC head's own transcript of each audio: the argmax tokens, runs collapsed, blanks dropped.
        audio: what `encode_audio` gives for this batch, where the caller has it."""
        training = self.training
        self.eval()
        audio = self.encode_audio(batch) if audio is None else audio
        self.train(training)
        return [
            str(self.tokenizer.decode(tokens, skip_special_tokens=True)).strip()
            for tokens in self._ctc_tokens(audio)
        ]

    @torch.no_grad()
    def inspect(self, batch: Batch, audio: Audio | None = None) -> dict[str, Any]:
        """What happens to each audio, for pictures; one entry per audio under each key. audio: what
        `encode_audio` gives for this batch, where the caller has it.

        mel [n_mels, F] (None for cached features), seconds, tokens [T] (argmax ids of the CTC head; `blank`
        is its blank), blank_probability [T], peak [T] (log-probability of the argmax), kept [K] (frame
        positions); and frame_rate, the adapter's frames per second, and blank, as plain numbers.
        """
        training = self.training
        self.eval()
        audio = self.encode_audio(batch) if audio is None else audio
        self.train(training)
        encoder_rate = self.encoder.frame_rate if self.encoder is not None else 50.0
        rate = encoder_rate / self.config.alignment.stack_frames
        seen: dict[str, Any] = {
            "mel": [],
            "seconds": [],
            "tokens": [],
            "blank_probability": [],
            "peak": [],
            "kept": [],
        }
        for i, (length, kept) in enumerate(
            zip(audio.lengths.tolist(), audio.kept_lengths.tolist(), strict=True)
        ):
            mel = None
            if batch.waveforms is not None:
                size = batch.audio_lengths[i : i + 1]
                mel = log_mel(batch.waveforms[i : i + 1, : int(size)], size, 80)[0][0].cpu()
            seen["mel"].append(mel)
            seen["seconds"].append(length / rate)
            seen["tokens"].append(audio.argmax[i, :length].cpu())
            seen["blank_probability"].append(audio.blank_logprob[i, :length].float().exp().cpu())
            seen["peak"].append(audio.peak[i, :length].float().cpu())
            seen["kept"].append(audio.kept[i, :kept].cpu())
        return {**seen, "frame_rate": rate, "blank": self.ctc_head.blank}
