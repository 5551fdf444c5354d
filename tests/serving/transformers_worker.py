"""The protocol of soundwave/vllm_worker.py with plain transformers behind it: what a backend's process does, on
machines without vLLM's environment. Run as a script, with the worker's arguments."""

from __future__ import annotations

import argparse
import json
import os
import queue
import socket
import struct
import subprocess
import sys
import threading

import torch
from transformers import AutoModelForCausalLM


class Rows:
    """Greedy answers, one step of every open row at a time, each with its own cache."""

    def __init__(self, llm, send):
        self.llm, self.send = llm, send
        self.open: dict[int, dict] = {}
        self.new: queue.Queue = queue.Queue()

    @torch.inference_mode()
    def work(self) -> None:
        while True:
            while self.new.qsize() or not self.open:
                request, embeddings = self.new.get()
                if "cancel" in request:
                    self.open.pop(request["cancel"], None)
                    print("cancelled", request["cancel"], file=sys.stderr, flush=True)
                else:
                    self.open[request["id"]] = {
                        "request": request,
                        "inputs": embeddings,
                        "cache": None,
                        "n": 0,
                    }
            for number, row in list(self.open.items()):
                inputs = row["inputs"]
                kind = {"inputs_embeds": inputs} if inputs.is_floating_point() else {"input_ids": inputs}
                out = self.llm(**kind, past_key_values=row["cache"], use_cache=True)
                token, row["cache"] = int(out.logits[0, -1].argmax()), out.past_key_values
                row["inputs"], row["n"] = torch.tensor([[token]]), row["n"] + 1
                ends = token in row["request"]["stop"]
                finish = "stop" if ends else "length" if row["n"] >= row["request"]["max_tokens"] else None
                self.send({"id": number, "tokens": [token], "finish": finish})
                if finish:
                    del self.open[number]


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("model", "socket", "dtype", "rows", "positions"):
        parser.add_argument(f"--{name}")
    options = parser.parse_args()
    engine = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])  # as vLLM has
    print(f"engine {engine.pid}", file=sys.stderr, flush=True)
    llm = AutoModelForCausalLM.from_pretrained(options.model, dtype=options.dtype).eval()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(options.socket)
    listener.listen()
    threading.Thread(target=lambda: (sys.stdin.buffer.read(), os._exit(0)), daemon=True).start()
    connection, _ = listener.accept()
    lines = connection.makefile("rb")

    def send(message: dict) -> None:
        data = json.dumps(message).encode()
        connection.sendall(struct.pack(">I", len(data)) + data)

    rows = Rows(llm, send)
    send({"ready": True})
    threading.Thread(target=rows.work, daemon=True).start()
    while head := lines.read(4):
        request = json.loads(lines.read(struct.unpack(">I", head)[0]))
        embeddings = None
        if "bytes" in request:
            data = bytearray(lines.read(request["bytes"]))
            embeddings = torch.frombuffer(data, dtype=torch.float32).reshape(1, *request["shape"])
        rows.new.put((request, embeddings))
    threading.Event().wait()  # until the standard input ends


if __name__ == "__main__":
    main()
