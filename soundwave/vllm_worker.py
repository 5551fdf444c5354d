"""The LLM in vLLM, in a process and an environment of its own: compressed audio in, tokens out.

Started by soundwave/vllm.py with the Python of `make setup-vllm`. It imports nothing of this project. One
client connects to the Unix socket. A message is 4 bytes (big-endian length), JSON, and `bytes` more bytes if
the JSON names them:

    client  {"id", "shape": [L, D], "bytes", "max_tokens", "temperature", "top_p", "stop": [ids]}  + float32
            {"cancel": id}
    worker  {"ready": true}
            {"id", "tokens": [new ids], "finish": null | "stop" | "length"}
            {"id", "error": "one line"}

The process ends when its standard input does, so that it does not outlive the server.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import struct
import sys

HEALTH_SECONDS = 1.0

# vLLM's own process for the engine is started by spawn, and this file is its main module, too.
if __name__ == "__main__":
    import torch
    from vllm import AsyncEngineArgs, SamplingParams
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.async_llm import AsyncLLM


class Worker:
    def __init__(self, engine: AsyncLLM, dtype: torch.dtype):
        self.engine, self.dtype = engine, dtype
        self.tasks: dict[int, asyncio.Task] = {}

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        def send(message: dict) -> None:
            data = json.dumps(message).encode()
            writer.write(struct.pack(">I", len(data)) + data)

        send({"ready": True})
        try:
            while True:
                (size,) = struct.unpack(">I", await reader.readexactly(4))
                request = json.loads(await reader.readexactly(size))
                if "cancel" in request:
                    if task := self.tasks.get(request["cancel"]):
                        task.cancel()
                    continue
                data = await reader.readexactly(request["bytes"])
                task = asyncio.create_task(self.answer(request, data, send))
                self.tasks[request["id"]] = task
                task.add_done_callback(self.discard_task(request["id"]))
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            for task in list(self.tasks.values()):
                task.cancel()
            writer.close()

    def discard_task(self, number: int):
        return lambda _: self.tasks.pop(number, None)

    async def answer(self, request: dict, data: bytes, send) -> None:
        number = request["id"]
        try:
            embeddings = torch.frombuffer(bytearray(data), dtype=torch.float32).reshape(request["shape"])
            params = SamplingParams(
                temperature=request["temperature"],
                top_p=request["top_p"],
                max_tokens=request["max_tokens"],
                stop_token_ids=request["stop"],
                detokenize=False,
                output_kind=RequestOutputKind.DELTA,
            )
            prompt = {"prompt_embeds": embeddings.to(self.dtype)}
            # A cancelled task leaves the generator, which aborts the request.
            async for output in self.engine.generate(prompt, params, request_id=str(number)):
                (row,) = output.outputs
                finish = ("length" if row.finish_reason == "length" else "stop") if output.finished else None
                send({"id": number, "tokens": list(row.token_ids), "finish": finish})
        except asyncio.CancelledError:
            raise
        except Exception as error:
            send({"id": number, "error": f"{type(error).__name__}: {error}".splitlines()[0]})


async def end_with(engine: AsyncLLM) -> None:
    """End this process where vLLM's engine, a process of its own, has died."""
    try:
        await engine.check_health()
    except Exception as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)


async def run() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True, help="folder of the LLM")
    parser.add_argument("--socket", required=True, help="path of the Unix socket to listen on")
    parser.add_argument("--dtype", required=True, help="torch's name of the type to compute in")
    parser.add_argument("--rows", type=int, required=True, help="requests that are answered at a time")
    parser.add_argument("--positions", type=int, help="the longest prompt and answer together, in tokens")
    parser.add_argument("--gpu-share", type=float, help="share of the GPU's memory that vLLM may take")
    options = parser.parse_args()
    engine = AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            model=options.model,
            dtype=options.dtype,
            enable_prompt_embeds=True,
            enable_prefix_caching=False,
            max_num_seqs=options.rows,
            max_model_len=options.positions,
            enforce_eager=not torch.cuda.is_available(),
            **({"gpu_memory_utilization": options.gpu_share} if options.gpu_share else {}),
        )
    )
    worker = Worker(engine, getattr(torch, options.dtype))
    server = await asyncio.start_unix_server(worker.serve, options.socket)
    closing = asyncio.get_running_loop().run_in_executor(None, sys.stdin.buffer.read)
    try:
        while not closing.done():
            await asyncio.wait([closing], timeout=HEALTH_SECONDS)
            await end_with(engine)
    finally:
        server.close()
        engine.shutdown()


if __name__ == "__main__":
    asyncio.run(run())
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # connections that are open are closed with the process
