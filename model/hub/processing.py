"""Processor of a Soundwave speech LLM: conversations and audio to the model's inputs."""

from __future__ import annotations

import torch
from transformers import BatchFeature, ProcessorMixin

from model.prompt import chat_ids

SAMPLE_RATE = 16_000


def read_audio(audio, sampling_rate: int | None = None) -> torch.Tensor:
    """Return [S] float32 at 16 kHz, mono. audio: a file's name, or samples [S] or [S, C] at `sampling_rate`.
    Errors: ValueError."""
    if isinstance(audio, str):
        import soundfile

        audio, sampling_rate = soundfile.read(audio, dtype="float32")
    samples = torch.as_tensor(audio)
    if not samples.is_floating_point():
        samples = samples.float() / torch.iinfo(samples.dtype).max
    samples = samples.float()
    samples = samples.mean(-1) if samples.dim() == 2 else samples
    if samples.dim() != 1 or not samples.numel() or not bool(samples.isfinite().all()):
        raise ValueError(
            f"audio of shape {list(samples.shape)}: give finite samples [S] or [S, C], not empty"
        )
    rate = sampling_rate or SAMPLE_RATE
    if rate != SAMPLE_RATE:
        try:
            import soxr
        except ImportError:
            raise ValueError(f"audio at {rate} Hz: resample it to 16000 Hz, or pip install soxr") from None
        samples = torch.from_numpy(soxr.resample(samples.numpy(), rate, SAMPLE_RATE))
    return samples


class SoundwaveProcessor(ProcessorMixin):
    """`apply_chat_template` makes inputs of conversations, `batch_decode` text of answers.

    A conversation is a list of {"role", "content"}; content is text, or a list of {"type": "text", "text"}
    and {"type": "audio", "audio": file name or samples}. What users write is text: it never becomes a
    control token.
    """

    def __init__(
        self, tokenizer=None, audio_token: str = "<audio_patch>", prompt: str = "chat", system=None, **more
    ):
        super().__init__(tokenizer, **more)
        self.audio_token, self.prompt, self.system = audio_token, prompt, system

    # transformers lists its own options one by one; those that are not supported are refused below.
    def apply_chat_template(  # type: ignore[override]
        self, conversation, sampling_rate: int | None = None, **options
    ) -> BatchFeature:
        """Return input_ids, attention_mask [B, L], and waveforms [A, S] with waveform_lengths [A].

        conversation: one or a list, each ending with a user's turn; sampling_rate: of samples that
        are given (default 16000). Errors: ValueError.
        """
        supported: dict[str, tuple[object, ...]] = {
            "tokenize": (True,),
            "return_dict": (True,),
            "return_tensors": ("pt",),
        }
        supported |= {"add_generation_prompt": (True,), "continue_final_message": (False,)}
        supported |= {"processor_kwargs": ({}, None)}  # of transformers' pipeline
        for name, value in options.items():
            if value not in supported.get(name, ()):
                raise ValueError(f"{name}={value!r} is not supported: leave it out")
        chats = [conversation] if isinstance(conversation[0], dict) else conversation
        rows: list[torch.Tensor] = []
        clips: list[torch.Tensor] = []
        for chat in chats:
            turns = [self._turn(turn, clips, sampling_rate) for turn in chat]
            ids, _ = chat_ids(self.tokenizer, turns, self.prompt, self.audio_token, self.system)
            rows.append(torch.tensor(ids))
        longest = max(map(len, rows))
        data = {
            "input_ids": torch.stack([_padded(row, longest) for row in rows]),
            "attention_mask": torch.stack([_padded(torch.ones_like(row), longest) for row in rows]),
        }
        if clips:
            samples = max(map(len, clips))
            data["waveforms"] = torch.stack([_padded(clip, samples) for clip in clips])
            data["waveform_lengths"] = torch.tensor([len(clip) for clip in clips])
        return BatchFeature(data)

    def __call__(self, text=None, audio=None, sampling_rate: int | None = None, **options) -> BatchFeature:
        """Return the inputs for a question about one audio, or for a list of each."""
        texts = [text] if isinstance(text, str) or text is None else list(text)
        audios = (
            [None] * len(texts)
            if audio is None
            else list(audio)
            if isinstance(audio, (list, tuple))
            else [audio]
        )
        if len(texts) != len(audios):
            raise ValueError(f"{len(audios)} audios for {len(texts)} texts: give one for each")
        chats = []
        for question, clip in zip(texts, audios, strict=True):
            parts = [] if clip is None else [{"type": "audio", "audio": clip}]
            parts += [{"type": "text", "text": question}] if question else []
            chats.append([{"role": "user", "content": parts}])
        return self.apply_chat_template(chats, sampling_rate=sampling_rate, **options)

    def _turn(self, turn: dict, clips: list[torch.Tensor], sampling_rate: int | None) -> dict:
        content = turn["content"]
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        lines, audios = [], 0
        for part in content:
            if part.get("type") == "text":
                lines.append(part["text"])
            elif part.get("type") == "audio":
                if "\n".join(lines).count(self.audio_token) > audios:
                    raise ValueError(f"text before audio may not hold {self.audio_token}")
                source = next((part[key] for key in ("audio", "path") if part.get(key) is not None), None)
                if source is None:
                    raise ValueError("a part of type audio has no audio: give a file name or samples")
                clips.append(read_audio(source, sampling_rate))
                lines.append(self.audio_token)
                audios += 1
            else:
                raise ValueError(f"a part of type {part.get('type')!r}: give text or audio")
        return {"role": turn["role"], "content": "\n".join(lines), "audios": audios}

    def post_process_multimodal_output(  # type: ignore[override]
        self, generated_outputs, skip_special_tokens=True, **options
    ) -> list[str]:
        return self.batch_decode(generated_outputs, skip_special_tokens=skip_special_tokens)

    def batch_decode(self, ids, **options) -> list[str]:
        return self.tokenizer.batch_decode(ids, **({"skip_special_tokens": True} | options))

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "waveforms", "waveform_lengths"]


def _padded(row: torch.Tensor, length: int) -> torch.Tensor:
    return torch.nn.functional.pad(row, (0, length - len(row)))
