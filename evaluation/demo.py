"""Serve a web page to talk to a model (needs: make setup EXTRAS="demo serve").

    python -m evaluation.demo MODEL
    python -m evaluation.demo --server http://127.0.0.1:8000

Record or upload speech, ask about it, and see the answer as it is written, the CTC head's transcript, words
with their times, and which frames the LLM was given. The page is a client of `python -m serving`: of a
running server, or of one that it starts on the loopback for MODEL. It listens on this machine alone unless
--host says otherwise.

What visitors may cost is bounded: bytes of an upload and of a request, seconds of audio, length of a
question, seconds of an answer, length of the queue. Recordings lie in a folder of this process alone, for an
hour at most, and go when it ends.
"""

from __future__ import annotations

import argparse
import contextlib
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
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from core.audio import EXTENSIONS, SAMPLE_RATE, AudioError, decode, largest_decoded
from core.command_line import CommandParser, accept_old_name
from core.console import one_line, print_error, printable
from core.request_body import AnswerThenRead
from core.spelling import join_words
from evaluation.endpoint import AddressError
from evaluation.model_server import ModelServer, ServerError, own_server
from model.features import log_mel
from model.picture import figure

QUESTION = "Please transcribe the following audio."
FORMATS = "WAV, FLAC, MP3, Ogg and Opus are read; convert others, as M4A: ffmpeg -i FILE out.flac"
# Browsers give pages a microphone where the address is https or this machine's own.
MICROPHONE = (
    "Your browser gives this page no microphone, because its address is neither https nor localhost: upload "
    "a file, use a proxy with TLS, or forward the port: ssh -L 7860:127.0.0.1:7860 HOST"
)
REQUEST_BYTES = 1 << 20  # of any request but an upload
SERVER_BYTES = 256 << 20  # of a request to the page's own server: an upload in base64
CLEAN_EVERY, KEEP_SECONDS = 600, 3600  # uploads


class Refusal(ValueError):
    """What a visitor asked for and does not get; one line for them, without anything of this machine in
    it."""


class Talker:
    """One server behind the page; one question at a time (Gradio queues the others)."""

    def __init__(self, server: ModelServer):
        self.server = server

    def stream_answer(self, file: str | None, question: str) -> Iterator[tuple]:
        """Yields (answer so far, CTC transcript, picture, timings as Markdown, words), None where nothing has
        changed. words: of the answer where it is a transcript (the question is QUESTION), else of the CTC
        transcript.

        Errors: AudioError, Refusal, ServerError (one line).
        """
        if not file:
            raise Refusal("no audio: record or upload some first")
        longest = self.server.max_seconds
        try:
            audio = decode(file, whole=False, max_seconds=longest, max_bytes=largest_decoded(longest))
        except AudioError as error:
            if (error.seconds or 0.0) > longest:
                raise Refusal(
                    f"the recording lasts {error.seconds:.0f} s, this model takes {longest:g} s at most"
                ) from None
            raise
        data, waveform = Path(file).read_bytes(), torch.from_numpy(audio.samples)
        if self.server.has_llm:
            yield from self._answer(data, waveform, question.strip())
            return
        began = time.perf_counter()
        transcript = self.server.transcribe(data)
        yield (
            "(A model of stage 1 has no LLM; below is its CTC transcript.)",
            transcript["text"],
            *self._shown(transcript, waveform, [("whole answer", time.perf_counter() - began)]),
            rows_of(transcript["words"]),
        )

    def _answer(self, data: bytes, waveform: torch.Tensor, question: str) -> Iterator[tuple]:
        is_transcript = question == QUESTION
        include = ["frames", "words"] if is_transcript else ["frames"]
        began, text, first = time.perf_counter(), "", None
        with contextlib.closing(self.server.stream_answer(data, question, include)) as pieces:
            for piece in pieces:
                if isinstance(piece, str):
                    text += piece
                    first = first or time.perf_counter() - began
                    yield text, None, None, timings([("time to first words", milliseconds(first))]), None
                    continue
                total = time.perf_counter() - began
                entries = piece["frames"]
                spent = [("time to first words", first or total), ("whole answer", total)]
                yield (
                    text,
                    join_words([entry["transcript"] for entry in entries]),
                    *self._shown(piece, waveform, spent),
                    rows_of(piece["words"] if is_transcript else entries[0]["words"]),
                )

    def _shown(self, answer: dict, waveform: torch.Tensor, spent: list[tuple[str, float]]) -> tuple[Any, str]:
        """The picture and the timings of an answer."""
        seconds = len(waveform) / SAMPLE_RATE
        inspection, texts = inspection_of(answer["frames"], waveform)
        frames, kept = len(inspection["tokens"][0]), len(inspection["kept"][0])
        lines = [("**warning**", text.replace("|", "/")) for text in answer.get("warnings", [])]
        lines += [
            ("audio", f"{seconds:.2f} s"),
            ("frames", f"{frames}, {kept} kept for the LLM ({kept / seconds:.1f} a second)"),
            *((name, milliseconds(value)) for name, value in spent),
            ("real-time factor", f"{spent[-1][1] / seconds:.2f}"),
        ]
        return figure(inspection, lambda tokens: "".join(texts.get(token, "?") for token in tokens)), timings(
            lines
        )


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms"


def inspection_of(entries: list[dict], waveform: torch.Tensor) -> tuple[dict, dict[int, str]]:
    """Return what `model.picture.figure` draws, of a server's `frames` of one recording, and the texts of its
    tokens. waveform [S] at 16 kHz."""
    tokens: list[int] = []
    blank_probability: list[float] = []
    peak: list[float] = []
    kept: list[int] = []
    texts: dict[int, str] = {}
    for entry in entries:
        kept += [len(tokens) + place for place in entry["kept"]]
        tokens += entry["tokens"]
        blank_probability += entry["blank_probability"]
        peak += entry["log_probability"]
        texts |= {int(token): text for token, text in entry["texts"].items()}
    mel = log_mel(waveform[None], torch.tensor([len(waveform)]), 80)[0][0]
    rate = entries[0]["rate"]
    inspection = {
        "mel": [mel],
        "seconds": [len(tokens) / rate],
        "tokens": [torch.tensor(tokens)],
        "blank_probability": [torch.tensor(blank_probability)],
        "peak": [torch.tensor(peak)],
        "kept": [torch.tensor(kept, dtype=torch.long)],
        "frame_rate": rate,
        "blank": entries[0]["blank"],
    }
    return inspection, texts


def rows_of(words: list[dict]) -> list[list[str]]:
    """Return rows of the table: word, start, end, confidence."""
    return [
        [word["word"], f"{word['start']:.2f}", f"{word['end']:.2f}", f"{word['confidence']:.2f}"]
        for word in words
    ]


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
        yield from talker.stream_answer(file, question)
    except AudioError as error:
        line = f"the recording cannot be used: {one_line(error)}"
        if error.reason in ("undecodable", "no_decoder"):
            line += f". {FORMATS}"
        raise Refusal(html.escape(printable(line))) from None
    except (Refusal, ServerError) as error:
        raise Refusal(html.escape(printable(one_line(error)))) from None
    except Exception as error:  # memory, for one; the next question may be answered
        print_error(f"error: a question was not answered: {one_line(error)}")
        raise Refusal("the question could not be answered; the reason is in the log of this server") from None


def example_clips(place: Path | None) -> list[Path]:
    """Return up to 8 audio files of a folder, by name. Errors: ValueError."""
    if place is None:
        return []
    clips = sorted(path for path in place.glob("*") if path.suffix[1:].lower() in EXTENSIONS)[:8]
    if not clips:
        raise ValueError(f"--examples {place}: no audio file is there")
    return clips


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
                question = gradio.Textbox(
                    value=QUESTION, label="Question", elem_id="question", visible=talker.server.has_llm
                )
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


def server_arguments(options: argparse.Namespace) -> list[str]:
    """The options of the page's own server."""
    arguments = [str(options.model), "--new-tokens", str(options.max_new_tokens)]
    arguments += ["--request-seconds", str(options.request_seconds), "--body-bytes", str(SERVER_BYTES)]
    return arguments + (["--device", options.device] if options.device else [])


def serve(options: argparse.Namespace, folder_of_uploads: str) -> int:
    os.environ.update(
        GRADIO_ANALYTICS_ENABLED="False", GRADIO_TEMP_DIR=folder_of_uploads
    )  # before the import, which reads them
    try:
        import gradio  # noqa: F401
    except ImportError:
        print_error('error: the page needs Gradio: make setup EXTRAS="demo serve"')
        return 2
    try:
        credentials, examples = login(options.login), example_clips(options.examples)
        key = None
        if options.token_env is not None and not (key := os.environ.get(options.token_env)):
            raise ValueError(
                f"--token-env {options.token_env}: set this environment variable to the server's API key"
            )
        with contextlib.ExitStack() as stack:
            url = options.server or stack.enter_context(own_server(server_arguments(options)))
            source = options.token_env or "the environment"
            talker = Talker(ModelServer(url, key, key_source=source, seconds=options.request_seconds))
            return show(options, talker, examples, credentials)
    except (AddressError, ServerError, ValueError) as error:
        print_error("error:", error)
        return 2


def show(
    options: argparse.Namespace,
    talker: Talker,
    examples: list[Path],
    credentials: tuple[str, str] | None,
) -> int:
    """Open the page, and keep it until the process is stopped."""
    import gradio
    from starlette.middleware import Middleware

    description = talker.server.description
    parts = filter(None, [description["encoder"], description["llm"]])
    title = f"Stage {description['stage']}: {' and '.join(parts)}"
    # Fonts of the system: Gradio's own theme fetches its fonts from the network.
    theme = gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    # The longest recording as stereo at 48 kHz in 32 bits, and room for headers.
    largest = int(talker.server.max_seconds * 2 * 48_000 * 4) + 2**20
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
    parser.add_argument(
        "model", type=Path, nargs="?", help="model folder to serve: <output>/<stage>/model; or --server"
    )
    parser.add_argument(
        "--server",
        metavar="URL",
        help="a running `python -m serving` or soundwave serve, in place of a model",
    )
    parser.add_argument(
        "--token-env", metavar="VARIABLE", help="environment variable with the API key of --server"
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: this machine alone)"
    )
    parser.add_argument("--port", type=int, default=7860, help="of the page")
    parser.add_argument(
        "--login", metavar="VARIABLE", help="environment variable with USER:PASSWORD that visitors must give"
    )
    parser.add_argument(
        "--examples", type=Path, metavar="DIR", help="folder of clips that visitors can choose (the first 8)"
    )
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument("--max-new-tokens", type=int, default=200, help="longest answer")
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
    if (options.model is None) == (options.server is None):
        parser.error("give a model folder, or --server URL of a running server")
    if options.token_env is not None and options.server is None:
        parser.error("--token-env needs --server")

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
