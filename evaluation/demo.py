"""Serve a web page to talk to a model (needs Gradio: make setup EXTRAS=demo).

    python -m evaluation.demo MODEL

Record or upload speech, ask about it, and see the answer as it is written, the CTC head's transcript, which
frames the LLM was given, and how long each part took. It listens on this machine alone unless --host says
otherwise, and sends nothing anywhere.

What visitors may cost is bounded: bytes of an upload and of a request, seconds of audio, length of a
question, seconds of an answer, length of the queue. Recordings lie in a folder of this process alone, for an
hour at most, and go when it ends.
"""

from __future__ import annotations

import argparse
import html
import ipaddress
import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import TextIteratorStreamer
from transformers.utils.logging import disable_progress_bar

from core.audio import EXTENSIONS, SAMPLE_RATE, AudioError, decode, largest_decoded
from core.command_line import CommandParser, accept_old_name
from core.console import one_line, print_error, printable
from core.request_body import AnswerThenRead
from core.samples import asked
from core.spelling import spell
from model import folder
from model.batch import Batch
from model.generation.timestamps import align_frames
from model.language_model import context_length
from model.picture import ctc_peaks, figure
from model.pretrained import SourceError
from model.prompt import PromptError
from model.soundwave import Audio, Soundwave

QUESTION = "Please transcribe the following audio."
CHARACTERS_PER_POSITION = 16  # of a question, at most: what is longer is refused before it is tokenised
FORMATS = "WAV, FLAC, MP3, Ogg and Opus are read; convert others, as M4A: ffmpeg -i FILE out.flac"
# Browsers give pages a microphone where the address is https or this machine's own.
MICROPHONE = (
    "Your browser gives this page no microphone, because its address is neither https nor localhost: upload "
    "a file, use a proxy with TLS, or forward the port: ssh -L 7860:127.0.0.1:7860 HOST"
)
REQUEST_BYTES = 1 << 20  # of any request but an upload
CLEAN_EVERY, KEEP_SECONDS = 600, 3600  # uploads


class Refusal(ValueError):
    """What a visitor asked for and does not get; one line for them, without anything of this machine in
    it."""


class Streamer(TextIteratorStreamer):
    """The answer in pieces, until `stopped` is set or `seconds` have passed: then the next token ends the
    generation."""

    def __init__(self, tokenizer, seconds: float):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.stopped = threading.Event()
        self.seconds, self.deadline = seconds, time.monotonic() + seconds

    def put(self, value: torch.Tensor) -> None:
        if self.stopped.is_set():
            raise CancelledError("the answer is no longer read")
        if time.monotonic() > self.deadline:
            raise Refusal(f"the answer was stopped after {self.seconds:g} s, the limit here")
        super().put(value)


class Talker:
    """One model behind the page; one question at a time (Gradio queues the others)."""

    def __init__(self, model: Soundwave, max_new_tokens: int, seconds: float = 120.0):
        self.model, self.max_new_tokens, self.seconds = model, max_new_tokens, seconds

    def warm_up(self) -> None:
        """The first call pays for what is loaded and compiled once: better before the first visitor than for
        them."""
        for _ in self.answer(torch.zeros(SAMPLE_RATE), QUESTION):
            pass

    def name_of(self, token: int) -> str:
        return str(self.model.tokenizer.decode([token]))

    def ask(self, file: str | None, question: str) -> Iterator[tuple]:
        """Yields (answer so far, CTC transcript, picture, timings as Markdown, words), None where nothing has
        changed. words: of the answer where it is a transcript (the question is QUESTION), else of the CTC
        transcript.

        Errors: AudioError, PromptError, Refusal (one line).
        """
        if not file:
            raise Refusal("no audio: record or upload some first")
        self.check_question(question)
        longest = self.model.config.encoder.max_seconds
        try:
            audio = decode(file, whole=False, max_seconds=longest, max_bytes=largest_decoded(longest))
        except AudioError as error:
            self.check_length(error.seconds or 0.0)
            raise
        yield from self.answer(
            torch.from_numpy(audio.samples), question, [finding.detail for finding in audio.findings]
        )

    def check_length(self, seconds: float) -> None:
        longest = self.model.config.encoder.max_seconds
        if seconds > longest:
            raise Refusal(f"the recording lasts {seconds:.0f} s, this model takes {longest:g} s at most")

    @property
    def positions(self) -> int | None:
        """How many the LLM has; None without an LLM, and where its configuration does not say."""
        if self.model.llm is None:
            return None
        return context_length(self.model.llm.config)

    def check_question(self, question: str) -> None:
        if self.positions is not None and len(question) > CHARACTERS_PER_POSITION * self.positions:
            raise Refusal(
                f"the question has {len(question)} characters, more than fit into the LLM's {self.positions} "
                f"positions"
            )

    def check_positions(self, batch: Batch, kept: int) -> None:
        """Room for the question, for what is kept of the audio (in place of its one token), and for the
        answer."""
        needed = batch.input_ids.shape[1] - 1 + kept
        if self.positions is not None and needed + self.max_new_tokens > self.positions:
            raise Refusal(
                f"question and audio take {needed} of the LLM's {self.positions} positions, and the answer "
                f"may take "
                f"{self.max_new_tokens}: ask a shorter question, or send a shorter recording"
            )

    def conversation(self, waveform: torch.Tensor, question: str) -> Batch:
        """The recording, then the question, as a conversation ready to be continued."""
        return self.model.prompts([[asked(question, self.model.config.audio_token)]], [waveform])

    def answer(self, waveform: torch.Tensor, question: str, findings: Sequence[str] = ()) -> Iterator[tuple]:
        """The same for a waveform [S] at 16 kHz. findings: warnings about it."""
        seconds = len(waveform) / SAMPLE_RATE
        self.check_length(seconds)
        began = time.perf_counter()
        with torch.no_grad():
            audio = self.model.encode_audio(self.conversation(waveform, ""))
        inspection = self.model.inspect(self.conversation(waveform, ""), audio)
        encoding = time.perf_counter() - began
        tokens = [
            token
            for _, token in ctc_peaks(inspection["tokens"][0], inspection["peak"][0], inspection["blank"])
        ]
        known = [t for t in tokens if t < len(self.model.tokenizer)]
        transcript = str(self.model.tokenizer.decode(known)).strip()
        kept, frames = len(inspection["kept"][0]), len(inspection["tokens"][0])
        picture = figure(inspection, self.name_of)
        if warning := self.model.length_warning(seconds):
            findings = [*findings, warning]
        lines = [
            ("audio", f"{seconds:.2f} s"),
            ("frames", f"{frames}, {kept} kept for the LLM ({kept / seconds:.1f} a second)"),
            ("encoder, adapter and CTC", f"{encoding * 1000:.0f} ms"),
        ]
        lines = [*(("**warning**", text.replace("|", "/")) for text in findings), *lines]
        if self.model.llm is None:
            yield (
                "(A model of stage 1 has no LLM; below is its CTC transcript.)",
                transcript,
                picture,
                timings(lines),
                self.words(transcript, audio, seconds),
            )
            return
        batch = self.conversation(waveform, question.strip())
        self.check_positions(batch, kept)
        yield "", transcript, picture, timings(lines), []
        began, text, first = time.perf_counter(), "", None
        for piece in self.stream(batch, audio):
            text += piece
            if not text:  # a token that completes no word yet
                continue
            first = first or time.perf_counter() - began
            yield text, None, None, timings([*lines, ("time to first words", f"{first * 1000:.0f} ms")]), None
        if self.model.unanswered:
            raise ValueError("; ".join(self.model.unanswered.values()))
        total = time.perf_counter() - began
        lines += [
            ("time to first words", f"{(first or total) * 1000:.0f} ms"),
            ("whole answer", f"{total:.2f} s"),
            ("real-time factor", f"{total / seconds:.2f}"),
        ]
        is_transcript = question.strip() == QUESTION
        yield (
            text,
            None,
            None,
            timings(lines),
            self.words(text if is_transcript else transcript, audio, seconds),
        )

    @torch.no_grad()
    def words(self, text: str, audio: Audio, seconds: float) -> list[list[str]]:
        """Return rows of the table: word, start, end, confidence, by alignment with the CTC head."""
        spelling = spell(self.model.tokenizer, text, self.model.ctc_text)
        aligned = align_frames(self.model, audio.hidden, audio.lengths, [spelling], [seconds])[0]
        return [
            [word.text, f"{word.start:.2f}", f"{word.end:.2f}", f"{word.confidence:.2f}"]
            for word in aligned.words
        ]

    def stream(self, batch: Batch, audio: Audio) -> Iterator[str]:
        """The answer in pieces; audio: what `encode_audio` gives for the batch. What goes wrong in the
        generating thread is raised here; it ends before this does."""
        streamer = Streamer(self.model.tokenizer, self.seconds)
        problems: list[BaseException] = []

        def work() -> None:
            try:
                self.model.generate(batch, max_new_tokens=self.max_new_tokens, streamer=streamer, audio=audio)
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


def table(rows: list[list[str]]) -> str:
    """The words as HTML. (Gradio's own table lets visitors upload files into it.)"""
    if not rows:
        return ""
    head, *body = (
        "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells)
        for tag, cells in [("th", ["word", "start", "end", "confidence"]), *(("td", row) for row in rows)]
    )
    lines = "".join(f"<tr>{line}</tr>" for line in [head, *body])
    return f'<div style="max-height: 16em; overflow: auto"><table>{lines}</table></div>'


class BodyLimit:
    """ASGI: a request whose body is longer than `most` bytes ends with status 413; uploads are counted by
    Gradio itself."""

    def __init__(self, app, most: int):
        self.app, self.most = app, most

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        is_upload = scope["path"].rstrip("/").endswith("/upload")
        received = 0

        async def counted():
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.most and not is_upload:
                from starlette.exceptions import HTTPException

                raise HTTPException(413, "this request is too long")
            return message

        await self.app(scope, counted, send)


def shown(talker: Talker, file: str | None, question: str) -> Iterator[tuple]:
    """`Talker.ask` for strangers: whatever goes wrong is one line here, and one without names of this machine
    for them.

    Errors: Refusal.
    """
    try:
        yield from talker.ask(file, question)
    except AudioError as error:
        line = f"the recording cannot be used: {one_line(error)}"
        if error.reason in ("undecodable", "no_decoder"):
            line += f". {FORMATS}"
        raise Refusal(html.escape(printable(line))) from None
    except (PromptError, Refusal) as error:
        raise Refusal(html.escape(printable(one_line(error)))) from None
    except Exception as error:  # memory, for one; the next question may be answered
        print_error(f"error: a question was not answered: {one_line(error)}")
        raise Refusal("the question could not be answered; the reason is in the log of this server") from None


def example_clips(place: Path | None) -> list[Path]:
    """Return up to 8 audio files of a folder, by name. Errors: ValueError."""
    if place is None:
        return []
    found = sorted(path for path in place.glob("*") if path.suffix[1:].lower() in EXTENSIONS)[:8]
    if not found:
        raise ValueError(f"--examples {place}: no audio file is there")
    return found


def page(talker: Talker, title: str, examples: Sequence[Path] = ()):
    """The Gradio page. examples: clips that visitors can choose."""
    import gradio

    def ask(file: str | None, question: str):
        try:
            for *outputs, rows in shown(talker, file, question):
                outputs.append(None if rows is None else table(rows))
                yield tuple(gradio.skip() if output is None else output for output in outputs)
        except Refusal as error:
            raise gradio.Error(str(error), print_exception=False) from None

    with gradio.Blocks(
        title="Soundwave", analytics_enabled=False, delete_cache=(CLEAN_EVERY, KEEP_SECONDS)
    ) as blocks:
        gradio.Markdown(f"# Soundwave\n{title}")
        with gradio.Row():
            with gradio.Column():
                audio = gradio.Audio(
                    sources=["microphone", "upload"], type="filepath", label="Speech", buttons=["download"]
                )
                if examples:  # gradio.Examples would put the files' paths into the page
                    with gradio.Row():
                        for path in examples:
                            gradio.Button(path.stem, size="sm").click(
                                lambda path=path: str(path), None, audio
                            )
                asks = talker.model.llm is not None
                question = gradio.Textbox(value=QUESTION, label="Question", elem_id="question", visible=asks)
                button = gradio.Button("Ask", variant="primary", elem_id="ask")
            with gradio.Column():
                answer = gradio.Textbox(label="Answer", lines=4, elem_id="answer")
                transcript = gradio.Textbox(label="CTC transcript", elem_id="transcript")
                times = gradio.Markdown(elem_id="timings")
        note = gradio.Markdown(elem_id="microphone")
        blocks.load(None, None, note, js=f"() => window.isSecureContext ? '' : {json.dumps(MICROPHONE)}")
        gradio.Markdown("Words with their times in seconds, by alignment with the CTC head")
        words = gradio.HTML(elem_id="words")
        gradio.Markdown(
            "Spectrogram with the frames that the LLM is given; probability of the blank; CTC peaks and "
            "their tokens"
        )
        picture = gradio.Plot(show_label=False, elem_id="picture")
        outputs = [answer, transcript, picture, times, words]
        for event in (button.click, question.submit):  # one queue for both: one question at a time
            event(ask, [audio, question], outputs, concurrency_limit=1, concurrency_id="ask")
    return blocks


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def login(variable: str | None) -> tuple[str, str] | None:
    """User and password of an environment variable. Errors: ValueError, without them."""
    if variable is None:
        return None
    user, _, password = os.environ.get(variable, "").partition(":")
    if not user or not password:
        raise ValueError(f"--login {variable}: set this environment variable to USER:PASSWORD")
    return user, password


def serve(options: argparse.Namespace, folder_of_uploads: str) -> int:
    os.environ.update(
        GRADIO_ANALYTICS_ENABLED="False", GRADIO_TEMP_DIR=folder_of_uploads
    )  # before the import, which reads them
    try:
        import gradio
        from starlette.middleware import Middleware
    except ImportError:
        print_error("error: the page needs Gradio: make setup EXTRAS=demo")
        return 2
    disable_progress_bar()
    try:
        credentials, examples = login(options.login), example_clips(options.examples)
        model = folder.load(
            options.model, device=options.device or ("cuda" if torch.cuda.is_available() else "cpu")
        )
    except (folder.FolderError, SourceError, ValueError) as error:
        print_error("error:", error)
        return 2
    talker = Talker(model, options.max_new_tokens, options.request_seconds)
    try:
        talker.warm_up()
    except Refusal as error:
        print_error(f"error: not even one second of audio can be answered: {error}; lower --max-new-tokens")
        return 2
    encoder, llm = (Path(part.name).name for part in (model.config.encoder, model.config.llm))
    title = f"Stage {model.stage}: {encoder} and {llm}"
    # Fonts of the system: Gradio's own theme fetches its fonts from the network.
    theme = gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    # The longest recording as stereo at 48 kHz in 32 bits, and room for headers.
    largest = int(model.config.encoder.max_seconds * 2 * 48_000 * 4) + 2**20
    if not is_loopback(options.host) and credentials is None:
        print_error(
            f"warning: whoever reaches {options.host}:{options.port} can use this page, unencrypted and "
            f"without a "
            "password: give --login, or keep --host at 127.0.0.1 and forward the port by ssh -L"
        )
    # Gradio 6.31 prints the stack of whatever a visitor makes it refuse: a line of the log is enough
    # (gradio/queueing.py).
    queueing: Any = gradio.queueing  # its traceback is a module, of which it calls one function
    queueing.traceback = SimpleNamespace(
        print_exc=lambda: print_error(f"error: a request was refused: {one_line(sys.exc_info()[1])}")
    )
    try:
        page(talker, title, examples).queue(max_size=options.waiting_jobs, api_open=False).launch(
            server_name=options.host,
            server_port=options.port,
            share=False,
            theme=theme,
            ssr_mode=False,
            quiet=True,
            prevent_thread_lock=True,
            footer_links=[],
            max_file_size=largest,
            allowed_paths=[str(path) for path in examples],
            auth=credentials,
            show_error=False,
            app_kwargs={
                "middleware": [Middleware(AnswerThenRead), Middleware(BodyLimit, most=REQUEST_BYTES)]
            },
        )
    except OSError as error:
        print_error(
            f"error: cannot listen on {options.host}:{options.port} ({one_line(error)}): choose another "
            f"--port"
        )
        return 2
    print(f"listening on http://{options.host}:{options.port} (Ctrl-C ends it)", flush=True)
    threading.Event().wait()
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = CommandParser("python -m evaluation.demo", __doc__.splitlines()[0], example="runs/me/sft/model")
    parser.add_argument("model", type=Path, help="model folder: <output>/<stage>/model")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: this machine alone)"
    )
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument(
        "--login", metavar="VARIABLE", help="environment variable with USER:PASSWORD that visitors must give"
    )
    parser.add_argument(
        "--examples", type=Path, metavar="DIR", help="folder of clips that visitors can choose (the first 8)"
    )
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument("--max-new-tokens", type=int, default=200)
    parser.add_argument(
        "--request-seconds", type=float, default=120.0, help="longest time for one answer (default: 120)"
    )
    accept_old_name(parser, "--max-seconds", "--request-seconds")
    parser.add_argument(
        "--waiting-jobs",
        type=int,
        default=16,
        help="questions that may wait; further ones are refused (default: 16)",
    )
    accept_old_name(parser, "--queue", "--waiting-jobs")
    options = parser.parse_args(arguments)

    def stop(*_) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)  # so that the uploads go
    try:
        with tempfile.TemporaryDirectory(
            prefix="soundwave-demo-"
        ) as folder_of_uploads:  # mode 700, a random name
            return serve(options, folder_of_uploads)
    except KeyboardInterrupt:
        print()
        return 0


if __name__ == "__main__":
    sys.exit(main())
