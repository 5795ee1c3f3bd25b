"""A page to talk to a model, and OpenAI's chat route, for this machine alone."""

import contextlib
import dataclasses
import json
import select
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Required, TypedDict

from lib.chat_formats import messages_of
from lib.errors import BadInput
from lib.records import checked, parse_json

LARGEST, PATIENCE = 2**20, 30  # bytes of a request; seconds that a client may take for a part of it
RULES = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"


class Request(TypedDict, total=False):
    messages: Required[list[dict[str, Any]]]
    stream: bool | None
    max_tokens: int | None
    max_completion_tokens: int | None
    temperature: float | None
    top_p: float | None
    seed: int | None
    stop: str | list[str] | None


class Handler(BaseHTTPRequestHandler):
    timeout, begun, stream = PATIENCE, False, False

    def log_message(self, *args):
        pass

    def handle(self):
        with contextlib.suppress(OSError):  # a client that has left, or is too slow
            super().handle()

    def reply(self, status: int, kind: str, body: bytes):
        self.begun = True
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Security-Policy", RULES)
        self.end_headers()
        self.wfile.write(body)

    def say(self, values: dict, status: int = 200):
        """Send an object: whole, or as a part of a stream."""
        text = json.dumps(values)
        if not self.stream:
            self.reply(status, "application/json", text.encode())
            return
        if not self.begun:
            self.reply(200, "text/event-stream", b"")
        self.wfile.write(f"data: {text}\n\n".encode())

    def refuse(self, why: str, status: int = 400):
        self.say({"error": {"message": why, "type": "invalid_request_error"}}, status)

    def is_foreign(self) -> bool:
        """Whether another site's page asks, which a name of its own may have led here."""
        port = self.server.server_address[1]
        return self.headers.get("Host") not in (f"127.0.0.1:{port}", f"localhost:{port}")

    def do_GET(self):
        if self.is_foreign() or self.path != "/":
            self.refuse("here is one page, http://127.0.0.1 and the port", 404)
            return
        page = Path(__file__).with_name("chat.html").read_bytes()
        self.reply(200, "text/html; charset=utf-8", page)

    def do_POST(self):
        size = self.headers.get("Content-Length", "")
        if self.is_foreign() or self.headers.get_content_type() != "application/json":
            self.refuse("only JSON from this machine is read", 403)
        elif self.path != "/v1/chat/completions":
            self.refuse(f"there is no {self.path} here", 404)
        elif not size.isdecimal() or int(size) > LARGEST:
            self.refuse(f"a request says its Content-Length, at most {LARGEST:,} bytes", 413)
        elif len(body := self.rfile.read(int(size))) == int(size):
            try:
                request = checked(parse_json(body, "the request"), Request, "the request")
                self.server.worker.submit(self.answer, request).result()
            except ValueError as error:
                self.refuse(str(error))

    def answer(self, request: Request):
        """Answer the last message; runs in the server's one worker. Raises ValueError."""
        given = {name: value for name, value in request.items() if value is not None}
        drawn = given.keys() & {"temperature", "top_p", "seed"}
        config = dataclasses.replace(self.server.config, **{name: given[name] for name in drawn})
        config.check()
        most = given.get("max_completion_tokens", given.get("max_tokens", config.max_new_tokens))
        stop = given.get("stop", [])
        stop = (stop,) if isinstance(stop, str) else tuple(stop)
        if most < 1 or "" in stop:
            raise BadInput(f"max_tokens {most} must be at least 1, and no stop empty")
        chat, (turns,) = self.server.chat, messages_of({"messages": given["messages"]})
        if not turns or turns[-1].role != "user":
            raise BadInput("the last of the messages must be the user's")
        chat.system = [turn for turn in turns if turn.role == "system"]
        chat.turns = [turn for turn in turns[:-1] if turn.role != "system"]
        self.stream, now = given.get("stream", False), time.time_ns()
        self.about = {"id": f"chat-{now}", "created": now // 10**9, "model": self.server.name}
        text = chat.answer(turns[-1].text, most, config, self.write, stop)
        both = {"prompt_tokens": chat.num_read, "completion_tokens": chat.num_written}
        usage = {"usage": both | {"total_tokens": sum(both.values())}}
        if not self.stream:
            message = {"message": {"role": "assistant", "content": text}}
            self.say(self.choice("chat.completion", message, chat.ended_by) | usage)
            return
        self.say(self.choice("chat.completion.chunk", {"delta": {}}, chat.ended_by) | usage)
        self.wfile.write(b"data: [DONE]\n\n")

    def choice(self, kind: str, said: dict, ended_by: str | None = None) -> dict:
        one = {"index": 0, **said, "finish_reason": ended_by}
        return {**self.about, "object": kind, "choices": [one]}

    def write(self, text: str):
        """Take a piece of the answer. Ends it, by an error, when the client or the server leaves."""
        readable, _, _ = select.select([self.connection], [], [], 0)
        if self.server.ended or readable and not self.connection.recv(1):
            raise ConnectionAbortedError
        if self.stream:
            delta = {"role": "assistant", "content": text}
            self.say(self.choice("chat.completion.chunk", {"delta": delta}))


def serve(chat, config):
    """Let anybody on this machine talk with a sample.Chat at --serve, until Ctrl-C or SIGTERM."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with ThreadingHTTPServer(("127.0.0.1", config.serve), Handler) as server:
        server.daemon_threads, server.ended = True, False
        server.chat, server.config, server.name = chat, config, Path(config.model).name
        server.worker = ThreadPoolExecutor(1)  # many requests are read at a time, one is answered
        print(f"http://127.0.0.1:{config.serve}", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            server.ended = True
            server.worker.shutdown(cancel_futures=True)
