"""Serve a model folder: `python -m serving MODEL` (needs: make setup EXTRAS=serve).

    python -m serving runs/mine/sft/model
    curl http://127.0.0.1:8000/v1/audio/transcriptions -F model=sft -F file=@clip.wav

OpenAI's API: /v1/audio/transcriptions, /v1/audio/translations, /v1/chat/completions, /v1/models; besides
/health and /metrics. Logs are JSON lines on standard error. TERM and INT: open requests are answered, then
the server ends with code 0.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import ipaddress
import os
import re
import signal
import socket
import sys
from pathlib import Path

from core.command_line import CommandParser, accept_old_name
from core.console import print_error
from serving.limits import Limits

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,95}")
_HELP = {
    "body_bytes": "of one request",
    "audio_seconds": "all audio of one request",
    "audios": "in one chat",
    "question_characters": "all text of one chat",
    "new_tokens": "of one answer",
    "request_seconds": "from a request's arrival to its last byte",
    "waiting_jobs": "in the queue; further requests get status 429",
    "open_requests": "read, waiting or running; further ones get status 429",
    "batch_rows": "answered together",
    "batch_seconds": "padded audio of a batch",
    "batch_tokens": "padded tokens of a batch, answers included",
    "batch_wait": "seconds that an idle server waits for further jobs",
}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = CommandParser("python -m serving", __doc__, example="runs/me/sft/model --port 8000")
    parser.add_argument("model", type=Path, help="model folder: <output>/<stage>/model")
    parser.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1, this machine alone")
    parser.add_argument("--port", type=int, default=8000, help="default: 8000; 0: any free port")
    parser.add_argument("--name", help="the model's name in the API (default: its folder's or stage's name)")
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="of the frozen parts")
    parser.add_argument("--encoder", help="folder of the frozen encoder, where the model's own is elsewhere")
    parser.add_argument("--llm", help="folder of the LLM, where the model's own is elsewhere")
    backend = parser.add_argument_group("LLM")
    backend.add_argument(
        "--backend", choices=["torch", "vllm"], default="torch", help="what runs the LLM (default: torch)"
    )
    backend.add_argument(
        "--vllm-python",
        type=Path,
        metavar="FILE",
        help="Python of vLLM's environment (default: .venv-vllm/bin/python, of make setup-vllm)",
    )
    token = parser.add_mutually_exclusive_group()
    token.add_argument("--token-env", metavar="VARIABLE", help="require this variable's value as API key")
    token.add_argument("--token-file", type=Path, metavar="FILE", help="require this file's line as API key")
    parser.add_argument("--no-batching", action="store_true", help="answer one request after the other")
    parser.add_argument(
        "--drain-seconds", type=float, default=60.0, help="for open requests after TERM (default: 60)"
    )
    parser.add_argument("--verbose", action="store_true", help="log requests of /health and /metrics, too")
    limits = parser.add_argument_group("limits")
    for field in dataclasses.fields(Limits):
        limits.add_argument(
            _option(field.name),
            dest=field.name,
            type=type(field.default),
            default=field.default,
            metavar="N",
            help=f"{_HELP[field.name]} (default: {field.default})",
        )
    accept_old_name(parser, "--new-tokens", "--max-new-tokens")
    options = parser.parse_args(arguments)
    for field in dataclasses.fields(Limits):
        value, least = getattr(options, field.name), 0 if field.name == "batch_wait" else 1
        if not least <= value < float("inf"):
            parser.error(f"{_option(field.name)} must be at least {least}")
    if options.backend != "vllm" and options.vllm_python:
        parser.error("--vllm-python needs --backend vllm")
    if options.backend == "vllm" and options.no_batching:
        parser.error("--no-batching needs --backend torch")
    if not 0 <= options.port <= 65_535:
        parser.error("--port must be from 0 to 65535")
    if options.name is not None and not _NAME.fullmatch(options.name):
        parser.error("--name holds letters, digits and . _ / -")
    return options


def _option(limit: str) -> str:
    """Return the option that sets a limit."""
    return "--max-new-tokens" if limit == "new_tokens" else f"--{limit.replace('_', '-')}"


def token_of(options: argparse.Namespace) -> str | None:
    """Return the API key that clients need. Errors: ValueError, without it."""
    if options.token_env is not None:
        token = os.environ.pop(options.token_env, "").strip()
        if not token:
            raise ValueError(f"--token-env {options.token_env}: set this environment variable to the API key")
    elif options.token_file is not None:
        try:
            token = options.token_file.read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--token-file {options.token_file}: cannot be read ({error})") from None
        if options.token_file.stat().st_mode & 0o077:
            print_error(f"warning: others can read {options.token_file}: chmod 600 it")
    else:
        return None
    if len(token) < 8 or not token.isascii() or not token.isprintable() or " " in token:
        raise ValueError("the API key must have at least 8 printable ASCII characters and no space")
    return token


def name_of(folder: Path) -> str:
    """runs/mine/sft/model -> sft; any other folder: its name."""
    folder = folder.resolve()
    name = folder.parent.name if folder.name == "model" else folder.name
    return re.sub(r"[^A-Za-z0-9._-]", "-", name).lstrip("._-") or "soundwave"


def bound_socket(host: str, port: int) -> socket.socket:
    """Errors: ValueError."""
    try:
        address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        sock = socket.socket(address[0], socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address[4])
    except (OSError, UnicodeError) as error:
        raise ValueError(
            f"cannot listen on {host}:{port} ({getattr(error, 'strerror', None) or error}): choose another "
            "--host or --port"
        ) from None
    return sock


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn
    except ImportError as error:
        print_error(f"error: serving needs {error.name}: make setup EXTRAS=serve")
        return 2
    import torch
    from transformers.utils.logging import disable_progress_bar

    from model import artifact
    from model.pretrained import SourceError
    from serving import logs
    from serving.app import Server
    from soundwave.vllm import start as start_vllm

    disable_progress_bar()
    try:
        token = token_of(options)
        sock = bound_socket(options.host, options.port)
        artifact.describe(options.model)
        log = logs.set_up("DEBUG" if options.verbose else "INFO")
        name = options.name or name_of(options.model)
        log.info("loading", extra={"model": name})
        model = artifact.load(
            options.model,
            encoder=options.encoder,
            llm=options.llm,
            dtype=options.dtype,
            device=options.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        )
        vllm = None
        if options.backend == "vllm":
            vllm = start_vllm(
                model, options.model, llm=options.llm, rows=options.batch_rows, python=options.vllm_python
            )
    except (artifact.FolderError, SourceError, ValueError, RuntimeError) as error:
        print_error("error:", error)
        return 2
    if not is_loopback(options.host):
        open_to_all = "" if token else " and without an API key (--token-env, --token-file)"
        print_error(
            f"warning: whoever reaches {options.host} can use this server, unencrypted{open_to_all}: put a "
            "proxy with TLS before it"
        )
    limits = Limits(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Limits)})
    server = Server(model, name, limits, token=token, batching=not options.no_batching, vllm=vllm)
    server.warm_up()

    class Uvicorn(uvicorn.Server):
        async def startup(self, sockets=None):
            await super().startup(sockets)
            host, port = sock.getsockname()[:2]
            log.info("ready", extra={"url": f"http://{host}:{port}/v1", "model": name, "pid": os.getpid()})

        @contextlib.contextmanager
        def capture_signals(self):
            """Drain on TERM and INT and end with code 0; uvicorn's own ends by the signal."""

            def stop(number, frame):
                self.force_exit = self.should_exit
                self.should_exit = True
                log.info("draining", extra={"signal": signal.Signals(number).name})

            before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
            try:
                yield
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)

    config = uvicorn.Config(
        server.app,
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="on",
        timeout_graceful_shutdown=round(options.drain_seconds),
        timeout_keep_alive=30,
        http="h11",
        ws="none",
    )
    Uvicorn(config).run(sockets=[sock])
    log.info("ended")
    return 0


if __name__ == "__main__":
    sys.exit(main())
