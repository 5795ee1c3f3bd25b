"""The page to talk on and OpenAI's chat route, with OpenAI's own client, in a browser, and attacked."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import ThreadingHTTPServer

import openai
import pytest

from conftest import ROOT, command
from data import Tokenizer
from lib.sampling import Sampling
from lib.server import Handler
from model import load, save
from sample import Chat


@pytest.fixture(scope="module")
def folder(tmp_path_factory, shared):
    """A model that learned stories, as a chat model."""
    folder = tmp_path_factory.mktemp("serve") / "stories"
    tokenizer = Tokenizer(shared("stories260K/tok512.rebuilt.model"))
    save(load(shared("stories260K/stories260K.bin")), folder, tokenizer, "plain")
    return folder


@pytest.fixture(scope="module")
def port(folder):
    """A server of it, in a process of its own."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = ["--model", str(folder), "--serve", str(port), "--temperature", "0", "--max_new_tokens", "40"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "sample.py"), *words, "--dtype", "fp32"], env=env, text=True, stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == f"http://127.0.0.1:{port}\n"
    yield port
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0


@pytest.fixture
def client(port):
    return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=60)


def here(folder, *texts: str, most: int = 40, stop: tuple[str, ...] = ()) -> str:
    chat = Chat(load(folder).eval(), Tokenizer(folder), "plain")
    return [chat.answer(text, most, Sampling(), lambda text: None, stop) for text in texts][-1]


def ask(client, *texts: str, **more):
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return client.chat.completions.create(model="any", messages=messages, **more)


STORY = "Once upon a time, Lily saw a cat."


def test_the_client_of_openai_gets_the_answer_of_a_chat_whole_and_streamed(client, folder):
    first = here(folder, STORY)
    whole = ask(client, STORY)
    assert whole.choices[0].message.content == first and whole.model == "stories"
    usage = whole.usage
    assert usage.completion_tokens == 40 and usage.total_tokens == usage.prompt_tokens + 40 > 50
    assert whole.choices[0].finish_reason == "length"
    parts = list(ask(client, STORY, stream=True))
    assert "".join(part.choices[0].delta.content or "" for part in parts) == first
    assert len(parts) > 10 and parts[-1].choices[0].finish_reason == "length"
    second = ask(client, STORY, first, "And then?", max_tokens=12)
    chat = Chat(load(folder).eval(), Tokenizer(folder), "plain")
    chat.answer(STORY, 40, Sampling(), lambda text: None)
    assert second.choices[0].message.content == chat.answer("And then?", 12, Sampling(), lambda text: None)


def test_what_a_request_says_counts(client, folder):
    stopped = ask(client, STORY, stop=["xyz", "said"])
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.choices[0].message.content == here(folder, STORY, stop=("xyz", "said")) == '"Hi, little boy,"'
    drawn = [ask(client, STORY, temperature=1.0, top_p=0.9, seed=seed) for seed in (1, 1, 2)]
    a, b, c = (answer.choices[0].message.content for answer in drawn)
    assert a == b != c
    parts = [{"type": "text", "text": STORY[:10]}, {"type": "text", "text": STORY[10:]}]
    told = [{"role": "developer", "content": "Be kind."}, {"role": "user", "content": parts}]
    said = client.chat.completions.create(model="x", messages=told, max_completion_tokens=9)
    chat = Chat(load(folder).eval(), Tokenizer(folder), "plain", "Be kind.")
    assert said.choices[0].message.content == chat.answer(STORY, 9, Sampling(), lambda text: None)


@pytest.mark.parametrize("texts, more, message", [
    ([STORY], dict(temperature=-1), "--temperature -1.0"), ([STORY], dict(max_tokens=0), "max_tokens 0"),
    ([STORY, "x"], {}, "the last of the messages must be the user's"), ([], {}, "must be the user's"),
    (["x " * 2000], {}, "tokens are too long"), ([STORY], dict(stop=[""]), "no stop empty"),
    ([STORY], dict(seed="x"), "field seed"), ([" "], dict(stream=True), "is empty"),
])  # fmt: skip
def test_a_bad_request_is_told_in_openais_shape(texts, more, message, client):
    with pytest.raises((openai.BadRequestError, openai.APIError), match=message):
        list(ask(client, *texts, **more))


def raw(port: int, request: bytes, wait: float = 60.0) -> bytes:
    with socket.create_connection(("127.0.0.1", port), wait) as connection:
        connection.sendall(request)
        parts = []
        while part := connection.recv(65536):
            parts.append(part)
        return b"".join(parts)


def post(port: int, body: bytes, host: str = "", kind: str = "application/json", size: int | None = None) -> bytes:
    size = len(body) if size is None else size
    host = host or f"127.0.0.1:{port}"
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: {kind}\r\n"
    return raw(port, f"{head}Content-Length: {size}\r\n\r\n".encode() + body)


GOOD = json.dumps({"messages": [{"role": "user", "content": STORY}], "max_tokens": 3}).encode()


def test_requests_are_bounded_and_other_sites_are_refused(port, client):
    assert b" 200 " in post(port, GOOD).splitlines()[0]
    assert b" 413 " in post(port, b"", size=2**20 + 1).splitlines()[0]
    assert b" 413 " in post(port, b"", size=-1).splitlines()[0]
    assert b" 403 " in post(port, GOOD, host="evil.example").splitlines()[0]
    assert b" 403 " in post(port, GOOD, kind="text/plain").splitlines()[0]
    assert b"is not JSON" in post(port, b"{")
    assert b"nested too deeply" in post(port, b"[" * 100_000)
    assert b" 404 " in raw(port, f"GET /x HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode()).splitlines()[0]
    assert b" 404 " in raw(port, b"GET / HTTP/1.1\r\nHost: evil.example\r\n\r\n").splitlines()[0]
    page = raw(port, f"GET / HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode()).decode()
    assert "default-src 'none'" in page and "http://" not in page and "https://" not in page


def test_broken_clients_harm_nobody(port, client, folder):
    """One leaves in the middle of a stream, one sends half a body, one nothing at all; nobody else notices."""
    silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(3)]
    silent[0].sendall(b"POST /v1/chat/completions HTTP/1.1\r\n")
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
    silent[1].sendall(f"{head}Content-Length: 500\r\n\r\n{{".encode())
    for streams in (True, False):
        body = json.dumps({"messages": [{"role": "user", "content": STORY}], "stream": streams, "max_tokens": 400})
        leaving = socket.create_connection(("127.0.0.1", port))
        leaving.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        if streams:
            assert leaving.recv(20)
        leaving.close()
    answers, expected = [], here(folder, STORY, most=20)
    threads = [
        threading.Thread(target=lambda: answers.append(ask(client, STORY, max_tokens=20).choices[0].message.content))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [expected] * 3
    for connection in silent:
        connection.close()


def test_many_clients_at_once_get_each_its_own_answer(client, folder):
    """One is answered after the other: they share a model that remembers what it has read."""
    names = ("Lily", "Tom", "The sun", "A big dog")
    questions = [f"Once upon a time, {name} was in the park." for name in names] * 2
    answers = {}

    def talk(number: int):
        answers[number] = ask(client, questions[number], max_tokens=30).choices[0].message.content

    threads = [threading.Thread(target=talk, args=(number,)) for number in range(len(questions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = [here(folder, question, most=30) for question in questions]
    assert [answers.get(number) for number in range(len(questions))] == expected and len(set(expected)) > 2


def test_a_client_that_says_nothing_is_left():
    class Hasty(Handler):
        timeout = 0.3

    assert 0 < Handler.timeout <= 60
    with ThreadingHTTPServer(("127.0.0.1", 0), Hasty) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with socket.create_connection(server.server_address, 30) as silent:
            silent.sendall(b"POST /v1/chat/completions HTTP/1.1\r\n")
            assert silent.recv(100) == b""
        server.shutdown()


def test_a_port_that_is_taken_is_one_sentence(port, folder):
    for taken, message in ((port, "Address already in use"), (70_000, "--serve 70000 is no port")):
        done = command("sample.py", "--model", str(folder), "--serve", str(taken), check=False)
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


class Browser:
    """A headless chromium, told by its debugging pipe what to do."""

    def __init__(self, profile, *more: str):
        (read, self.write), (self.read, write) = os.pipe(), os.pipe()
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", f"--user-data-dir={profile}"]
        flags += ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run"]
        script = 'exec 3<&"$1" 4>&"$2"; shift 2; exec "$@"'
        self.process = subprocess.Popen(
            ["bash", "-c", script, "bash", str(read), str(write), "chromium", *flags, *more],
            pass_fds=(read, write), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        self.number, self.session, self.rest = 0, {}, b""
        page = self.tell("Target.createTarget", url="about:blank")["targetId"]
        self.session = {"sessionId": self.tell("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]}

    def tell(self, method: str, **params) -> dict:
        self.number += 1
        message = {"id": self.number, "method": method, "params": params} | self.session
        os.write(self.write, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.rest:
                self.rest += os.read(self.read, 2**20)
            text, _, self.rest = self.rest.partition(b"\0")
            said = json.loads(text)
            if said.get("id") == self.number:
                return said["result"]

    def evaluate(self, expression: str):
        return self.tell("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def until(self, expression: str):
        ends = time.monotonic() + 120
        while not self.evaluate(expression):
            assert time.monotonic() < ends, expression
            time.sleep(0.1)


@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium here")
def test_one_talks_on_the_page(port, folder, tmp_path):
    browser = Browser(tmp_path / "profile")
    try:
        browser.tell("Page.navigate", url=f"http://127.0.0.1:{port}/")
        browser.until("document.getElementById('text') && document.readyState == 'complete'")
        typed = "text.value = {}; text.dispatchEvent(new KeyboardEvent('keydown', {{key: 'Enter'}}))"
        browser.evaluate(f"stop; text = document.getElementById('text'); {typed.format(json.dumps(STORY))}")
        browser.until("document.getElementById('stop').disabled")
        said = browser.evaluate("[...document.querySelectorAll('#log div')].map(part => part.textContent)")
        assert said == [STORY, here(folder, STORY)]
        markup = "<img src=x onerror=alert(1)> " * 200
        browser.evaluate(typed.format(json.dumps(markup)))
        browser.until("document.getElementById('stop').disabled")
        assert browser.evaluate("document.querySelectorAll('img').length") == 0
        assert "tokens are too long" in browser.evaluate("document.querySelector('.error').textContent")
        browser.evaluate("document.getElementById('clear').click()")
        assert browser.evaluate("document.querySelectorAll('#log div').length") == 0
    finally:
        browser.process.kill()
        browser.process.wait()
