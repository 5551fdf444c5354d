"""From samples (JSON and waveform) to one micro-batch of tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from core.console import one_line
from core.ctc_text import ctc_target_ids
from core.samples import answer_language, messages_of, prompt_of, transcript_of
from model.batch import Batch
from model.config import SoundwaveConfig
from model.prompt import IGNORED, audio_count, chat_ids
from model.stages import STAGES
from stream.reader import SAMPLE_RATE, Sample
from stream.rejected import BrokenSample

DUMMY_SAMPLES = SAMPLE_RATE // 5  # silent audio of a micro-batch that has none
DUMMY_FRAMES = 10


@dataclass
class Prepared:
    """One utterance as token ids."""

    sample: Sample
    input_ids: list[int]  # empty in stage 1
    labels: list[int]
    ctc_target: list[int]  # empty: takes no part in the CTC term


def _padded(clips: list[torch.Tensor]) -> torch.Tensor:
    """[S, ...] float32 each -> [A, longest, ...], zero behind each. A worker makes it in shared memory, where
    it would be copied to otherwise."""
    shape = len(clips), max(map(len, clips)), *clips[0].shape[1:]
    if torch.utils.data.get_worker_info() is None:
        padded = torch.zeros(shape)
    else:
        memory = torch.UntypedStorage._new_shared(
            4 * math.prod(shape)
        )  # of zeros; as torch's own default_collate does it
        empty: Any = torch.empty(0)  # torch's stub of set_ knows typed storages only
        padded = empty.set_(memory, 0, shape)
    for row, clip in zip(padded, clips, strict=True):
        row[: len(clip)] = clip
    return padded


class Collator:
    """Turns samples into Batches for one stage.

    answers: with the assistant's words and labels (training), or the prompt alone, ready to be continued
    (generation). token_limit: LLM positions that one row's text may take (None: any). row_limit: those that
    text and audio may take, at most one a frame (`model.rows.longest_row`). feature_width: width of cached
    encoder features, where used.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        model_config: SoundwaveConfig,
        stage: str,
        ctc_text: str,
        *,
        answers: bool = True,
        token_limit: int | None = None,
        row_limit: int | None = None,
        feature_width: int | None = None,
    ):
        self.tokenizer, self.ctc_text = tokenizer, ctc_text
        self.stage = STAGES[stage]
        self.chat: dict[str, Any] = {
            "style": model_config.prompt,
            "audio_token": model_config.audio_token,
            "system": model_config.system_prompt,
        }
        self.audio_token = model_config.audio_token
        self.answers, self.token_limit, self.feature_width = answers, token_limit, feature_width
        self.row_limit, self.stack_frames = row_limit, model_config.alignment.stack_frames

    def prepare(self, sample: Sample) -> Prepared:
        """Errors: BrokenSample where the JSON lacks what the stage needs, or does not fit its audio."""
        text = transcript_of(sample.meta) if sample.has_audio else ""
        target = ctc_target_ids(self.tokenizer, text, self.ctc_text)
        if not self.stage.needs_llm:
            if not sample.has_audio:
                raise BrokenSample(f"no audio: stage {self.stage.name} trains on transcribed audio only")
            if not target and self.answers:
                raise BrokenSample(
                    "no transcript in its JSON (`text` is missing or empty after normalisation)"
                )
            return Prepared(sample, [], [], target)
        try:
            messages = messages_of(sample.meta, self.audio_token)
            if not self.answers:
                messages = prompt_of(messages)
            audios = audio_count(messages, self.audio_token)
            if audios != sample.has_audio:
                raise BrokenSample(
                    f"its messages hold {audios} x {self.audio_token}, its audio counts "
                    f"{int(sample.has_audio)}"
                )
            input_ids, labels = chat_ids(self.tokenizer, messages, **self.chat)
        except BrokenSample:
            raise
        except (
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
        ) as error:  # whatever malformed JSON leads to in a chat
            raise BrokenSample(f"its JSON makes no conversation: {one_line(error)}") from None
        if self.token_limit is not None and len(input_ids) > self.token_limit:
            raise BrokenSample(
                f"its conversation takes {len(input_ids)} LLM positions, above "
                f"data.micro_batch_tokens={self.token_limit}"
            )
        if (
            self.row_limit is not None
            and (most := len(input_ids) + self._most_frames(sample)) > self.row_limit
        ):
            raise BrokenSample(
                f"its conversation may take {most} LLM positions, above {self.row_limit}, beyond which this "
                f"LLM's "
                "rotary positions depend on the longest row of a batch"
            )
        return Prepared(sample, input_ids, labels, target)

    def _most_frames(self, sample: Sample) -> int:
        """LLM positions that a sample's audio may take."""
        if sample.features is not None:
            frames: float = len(sample.features)
        elif sample.waveform is not None:
            frames = len(sample.waveform) * DUMMY_FRAMES / DUMMY_SAMPLES
        else:
            return 0
        return math.ceil(frames / self.stack_frames)

    def __call__(self, prepared: list[Prepared]) -> Batch:
        """[B] utterances -> Batch, right padded. No utterance at all makes a dummy: all ranks run all
        modules."""
        heard = [p for p in prepared if p.sample.has_audio]
        waveforms = features = None
        if self.feature_width is not None:
            cached = [features for p in heard if (features := p.sample.features) is not None]
            frames = [one.float() for one in cached] or [torch.zeros(DUMMY_FRAMES, self.feature_width)]
            features = _padded(frames)
            lengths = torch.tensor([len(f) for f in frames])
        else:
            given = [waveform for p in heard if (waveform := p.sample.waveform) is not None]
            clips = given or [torch.zeros(DUMMY_SAMPLES)]
            waveforms = _padded(clips)
            lengths = torch.tensor([len(clip) for clip in clips])
        targets = [p.ctc_target for p in heard] or [[]]
        if not self.stage.needs_llm:  # as many rows as audios, none with tokens
            input_ids = attention_mask = labels = torch.zeros(max(len(prepared), 1), 0, dtype=torch.long)
        else:
            input_ids, attention_mask, labels = self._pad_rows(
                [(p.input_ids, p.labels) for p in prepared] or [self._dummy_row()]
            )
        return Batch(
            waveforms=waveforms,
            features=features,
            audio_lengths=lengths,
            audio_is_dummy=not heard,
            ctc_targets=pad_sequence([torch.tensor(t, dtype=torch.long) for t in targets], batch_first=True),
            ctc_target_lengths=torch.tensor([len(t) for t in targets]),
            has_transcript=torch.tensor([bool(t) for t in targets]),
            input_ids=input_ids,
            attention_mask=attention_mask,
            labels=labels,
            ids=[str(p.sample.meta.get("id", "")) for p in prepared],
            tasks=[str(p.sample.meta.get("task", "")) for p in prepared],
            languages=[self._language_of(p.sample.meta) for p in prepared],
            mel_mask=self._pad_masks([p.sample.mel_mask for p in heard]),
            audio_keys=torch.tensor([p.sample.dropout_key for p in heard] or [0]),
            row_keys=torch.tensor([p.sample.dropout_key for p in prepared] or [0]),
            audio_rows=torch.tensor(
                [i for i, p in enumerate(prepared) if p.sample.has_audio], dtype=torch.long
            ),
        )

    def _language_of(self, sample: dict) -> str | None:
        """The language of what is scored: the transcript's, or the answer's."""
        return sample.get("lang") if self.stage.score == "ctc" else answer_language(sample)

    @staticmethod
    def _pad_masks(masks: list[torch.Tensor | None]) -> torch.Tensor | None:
        """[n_mels, F] each -> [A, n_mels, F]; nothing is masked behind a clip's end."""
        drawn = [mask.T for mask in masks if mask is not None]
        return pad_sequence(drawn, batch_first=True).transpose(1, 2) if drawn else None

    def _dummy_row(self) -> tuple[list[int], list[int]]:
        messages = [{"role": "user", "content": "."}] + (
            [{"role": "assistant", "content": "."}] if self.answers else []
        )
        ids, _ = chat_ids(self.tokenizer, messages, **self.chat)
        return ids, [IGNORED] * len(ids)

    def _pad_rows(
        self, rows: list[tuple[list[int], list[int]]]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        padding = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0
        ids = [torch.tensor(ids, dtype=torch.long) for ids, _ in rows]
        labels = [torch.tensor(labels, dtype=torch.long) for _, labels in rows]
        mask = [torch.ones_like(i) for i in ids]
        return (
            pad_sequence(ids, batch_first=True, padding_value=padding),
            pad_sequence(mask, batch_first=True),
            pad_sequence(labels, batch_first=True, padding_value=IGNORED),
        )
