"""A page to talk to a model: `python -m evaluation.demo MODEL` (needs Gradio: pip install -r requirements-demo.txt).

Record or upload speech, ask about it, and see the answer as it is written, what the CTC head heard, which frames the LLM was
given, and how long each part took. It listens on this machine alone unless --host says otherwise, and sends nothing anywhere.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError
from pathlib import Path

import torch
from transformers import TextIteratorStreamer
from transformers.utils.logging import disable_progress_bar

from core.audio import SAMPLE_RATE, AudioError, decode, largest_decoded
from core.samples import asked
from evaluation.picture import ctc_peaks, figure
from model import folder
from model.batch import Batch
from model.pretrained import SourceError
from model.soundwave import Soundwave

QUESTION = "Please transcribe the following audio."


class Streamer(TextIteratorStreamer):
    """The answer in pieces, until `stopped` is set: then the next token ends the generation."""

    def __init__(self, tokenizer):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.stopped = threading.Event()

    def put(self, value: torch.Tensor) -> None:
        if self.stopped.is_set():
            raise CancelledError("nobody reads on")
        super().put(value)


class Talker:
    """One model behind the page; one question at a time (Gradio queues the others)."""

    def __init__(self, model: Soundwave, max_new_tokens: int):
        self.model, self.max_new_tokens = model, max_new_tokens

    def warm_up(self) -> None:
        """The first call pays for what is loaded and compiled once: better before the first visitor than for them."""
        for _ in self.answer(torch.zeros(SAMPLE_RATE), QUESTION):
            pass

    def name_of(self, token: int) -> str:
        return self.model.tokenizer.decode([token])

    def ask(self, file: str | None, question: str) -> Iterator[tuple]:
        """Yields (answer so far, CTC transcript, picture, timings as Markdown), None where nothing has changed.

        Errors: ValueError (AudioError among them), one line.
        """
        if not file:
            raise ValueError("no audio: record or upload some first")
        longest = self.model.config.encoder.max_seconds
        try:
            audio = decode(file, whole=False, max_seconds=longest, max_bytes=largest_decoded(longest))
        except AudioError as error:
            self.check_length(error.seconds or 0.0)
            raise
        yield from self.answer(torch.from_numpy(audio.samples), question, [finding.detail for finding in audio.findings])

    def check_length(self, seconds: float) -> None:
        longest = self.model.config.encoder.max_seconds
        if seconds > longest:
            raise ValueError(f"the recording lasts {seconds:.0f} s, this model takes {longest:g} s at most")

    def conversation(self, waveform: torch.Tensor, question: str) -> Batch:
        """The recording, then the question, as a conversation ready to be continued."""
        return self.model.prompts([[asked(question, self.model.config.audio_token)]], [waveform])

    def answer(self, waveform: torch.Tensor, question: str, findings: Sequence[str] = ()) -> Iterator[tuple]:
        """The same for a waveform [S] at 16 kHz. findings: warnings about it."""
        seconds = len(waveform) / SAMPLE_RATE
        self.check_length(seconds)
        began = time.perf_counter()
        inspection = self.model.inspect(self.conversation(waveform, ""))
        heard = time.perf_counter() - began
        tokens = [token for _, token in ctc_peaks(inspection["tokens"][0], inspection["peak"][0], inspection["blank"])]
        transcript = self.model.tokenizer.decode([t for t in tokens if t < len(self.model.tokenizer)]).strip()
        kept, frames = len(inspection["kept"][0]), len(inspection["tokens"][0])
        picture = figure(inspection, self.name_of)
        if warning := self.model.length_warning(seconds):
            findings = [*findings, warning]
        lines = [("audio", f"{seconds:.2f} s"), ("frames", f"{frames}, {kept} kept for the LLM ({kept / seconds:.1f} a second)"),
                 ("encoder, adapter and CTC", f"{heard * 1000:.0f} ms")]
        lines = [*(("**warning**", text.replace("|", "/")) for text in findings), *lines]
        if self.model.llm is None:
            yield "(A model of stage I has no LLM; below is what its CTC head heard.)", transcript, picture, timings(lines)
            return
        yield "", transcript, picture, timings(lines)
        began, text, first = time.perf_counter(), "", None
        for piece in self.stream(self.conversation(waveform, question.strip())):
            text += piece
            if not text:  # a token that completes no word yet
                continue
            first = first or time.perf_counter() - began
            yield text, None, None, timings([*lines, ("time to first words", f"{first * 1000:.0f} ms")])
        if self.model.unanswered:
            raise ValueError("; ".join(self.model.unanswered.values()))
        total = time.perf_counter() - began
        lines += [("time to first words", f"{(first or total) * 1000:.0f} ms"), ("whole answer", f"{total:.2f} s"),
                  ("real-time factor", f"{total / seconds:.2f}")]
        yield text, None, None, timings(lines)

    def stream(self, batch) -> Iterator[str]:
        """The answer in pieces. What goes wrong in the generating thread is raised here; it ends before this does."""
        streamer = Streamer(self.model.tokenizer)
        problems: list[BaseException] = []

        def work() -> None:
            try:
                self.model.generate(batch, max_new_tokens=self.max_new_tokens, streamer=streamer)
            except BaseException as problem:
                problems.append(problem)
                streamer.end()

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            yield from streamer
        finally:  # also where the visitor has left: the next question must not run beside this one
            streamer.stopped.set()
            thread.join()
        if problems:
            raise problems[0]


def timings(lines: list[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in lines)])


def page(talker: Talker, title: str):
    """The Gradio page."""
    import gradio

    def ask(file: str | None, question: str):
        try:
            for outputs in talker.ask(file, question):
                yield tuple(gradio.skip() if output is None else output for output in outputs)
        except ValueError as error:  # AudioError among them
            raise gradio.Error(str(error)) from None

    with gradio.Blocks(title="Soundwave", analytics_enabled=False) as blocks:
        gradio.Markdown(f"# Soundwave\n{title}")
        with gradio.Row():
            with gradio.Column():
                audio = gradio.Audio(sources=["microphone", "upload"], type="filepath", label="Speech", buttons=["download"])
                asks = talker.model.llm is not None
                question = gradio.Textbox(value=QUESTION, label="Question", elem_id="question", visible=asks)
                button = gradio.Button("Ask", variant="primary", elem_id="ask")
            with gradio.Column():
                answer = gradio.Textbox(label="Answer", lines=4, elem_id="answer")
                transcript = gradio.Textbox(label="What the CTC head heard", elem_id="transcript")
                times = gradio.Markdown(elem_id="timings")
        gradio.Markdown("Spectrogram with the frames that the LLM is given; probability of the blank; CTC peaks and their tokens")
        picture = gradio.Plot(show_label=False, elem_id="picture")
        outputs = [answer, transcript, picture, times]
        for event in (button.click, question.submit):  # one queue for both: one question at a time
            event(ask, [audio, question], outputs, concurrency_limit=1, concurrency_id="ask")
    return blocks


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m evaluation.demo", description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="model folder: <output>/<stage>/model")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine alone)")
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument("--max-new-tokens", type=int, default=200)
    options = parser.parse_args(arguments)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio
    except ImportError:
        print("error: the page needs Gradio: pip install -r requirements-demo.txt", file=sys.stderr)
        return 2
    disable_progress_bar()
    try:
        model = folder.load(options.model, device=options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except (folder.FolderError, SourceError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    talker = Talker(model, options.max_new_tokens)
    talker.warm_up()
    encoder, llm = (Path(part.name).name for part in (model.config.encoder, model.config.llm))
    title = f"`{options.model}` (stage {model.stage}): {encoder} and {llm}"
    # Fonts of the system: Gradio's own theme fetches its fonts from the network.
    theme = gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    # The longest recording as stereo at 48 kHz in 32 bits, and room for headers.
    largest = int(model.config.encoder.max_seconds * 2 * 48_000 * 4) + 2**20
    try:
        page(talker, title).queue().launch(
            server_name=options.host, server_port=options.port, share=False, theme=theme, ssr_mode=False, quiet=True,
            prevent_thread_lock=True, footer_links=[], max_file_size=largest)
    except OSError as error:
        print(f"error: cannot listen on {options.host}:{options.port} ({error}): choose another --port", file=sys.stderr)
        return 2
    print(f"listening on http://{options.host}:{options.port} (Ctrl-C ends it)", flush=True)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
