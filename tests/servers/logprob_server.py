"""A tiny server in a thread with vLLM's `prompt_logprobs`, over a model in torch, that fails when
told to.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch

# Gets the number of the request and its right answer. Returns a status with an answer, or None for
# a connection that is cut.
Fault = Callable[[int, dict[str, Any]], tuple[int, Any] | None]


class LogprobServer:
    """Answers as vLLM does for the model in ``folder``, called ``name``."""

    def __init__(self, folder: Path, *, name: str = "big", key: str | None = None) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self._shown = [self.tokenizer.decode([t]) for t in range(self.model.config.vocab_size)]
        self.name, self.key = name, key
        self.context: int | None = 4096
        self.fault: Fault | None = None
        self.asked: list[list[int]] = []  # prompts, in the order of their answers
        self.bodies: list[dict[str, Any]] = []
        self.at_once = self.most_at_once = 0
        self._lock = threading.Lock()

    def __enter__(self) -> LogprobServer:
        serves = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                serves.answer(self, None)

            def do_POST(self) -> None:
                length = int(self.headers["content-length"])
                serves.answer(self, json.loads(self.rfile.read(length)))

            def log_message(self, *_: Any) -> None:
                """Nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def answer(self, handler: BaseHTTPRequestHandler, body: dict[str, Any] | None) -> None:
        if self.key and handler.headers["authorization"] != f"Bearer {self.key}":
            return self._send(handler, 401, {"error": {"message": "invalid key"}})
        if body is None:
            entry = {"id": self.name}
            if self.context is not None:
                entry |= {"max_model_len": self.context}
            return self._send(handler, 200, {"data": [entry]})
        if (most := max(body["prompt"])) >= self.model.config.vocab_size:  # as vLLM says it
            error = {"error": {"message": f"Token id {most} is out of vocabulary"}}
            return self._send(handler, 400, error)
        with self._lock:
            self.bodies.append(body)
            number = len(self.bodies) - 1
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        right = self.right(body["prompt"], body["prompt_logprobs"])
        given = self.fault(number, right) if self.fault else (200, right)
        with self._lock:
            self.at_once -= 1
            if given is not None and given[0] == 200:
                self.asked.append(body["prompt"])
        if given is None:
            handler.close_connection = True
            handler.connection.close()
            return None
        return self._send(handler, *given)

    @torch.no_grad()
    def right(self, ids: list[int], k: int) -> dict[str, Any]:
        """The right answer: as vLLM writes it, the label's token beside the k likeliest."""
        with self._lock:
            logp = torch.log_softmax(self.model(torch.tensor([ids])).logits[0].float(), -1)
        entries: list[dict[str, Any] | None] = [None]
        for row, label in zip(logp, ids[1:], strict=False):
            value, token = row.topk(k)
            found = dict(zip(token.tolist(), value.tolist(), strict=True))
            found[label] = float(row[label])
            entries.append(
                {
                    str(t): {
                        "logprob": v,
                        "rank": int((row > v).sum()) + 1,
                        "decoded_token": self._shown[t],
                    }
                    for t, v in found.items()
                }
            )
        choice = {"index": 0, "text": "x", "finish_reason": "length", "prompt_logprobs": entries}
        return {"model": self.name, "choices": [choice], "usage": {"prompt_tokens": len(ids)}}

    @staticmethod
    def _send(handler: BaseHTTPRequestHandler, status: int, body: Any) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        handler.send_response(status)
        handler.send_header("content-type", "application/json")
        handler.send_header("content-length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)
