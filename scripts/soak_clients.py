"""The clients of scripts/soak.py that search, and those that send what is no request."""

import http.client
import json
import random
import socket
import threading
import time
from collections import Counter
from contextlib import suppress

from scripts.drill_data import USED

SCORES, SEARCH = "/scan_sentence_image_score", "/api/search"
JSON = {"content-type": "application/json"}
# The hostile clients have an address of their own: what the server allows an address is theirs.
THEIR_ADDRESS = ("127.0.0.2", 0)
NO_BODIES = (
    b"",
    b"{",
    b"\xff\xfe" * 500,
    b"[" * 50_000,
    b"[]," * 50_000,
    b'{"sentence": ' + b"9" * 5000 + b"}",
    b'{"sentence": "a dog", "boxes": 3}',
    json.dumps({"sentence": ["w1"], "boxes": [{}], "whole_items": None}).encode(),
    json.dumps({"sentence": ["w1"] * 100_000, "boxes": []}).encode(),
    json.dumps({"query": "w1 " * 10_000}).encode(),
    json.dumps({"query": "w1", "topk": -1, "\0": [[[]]]}).encode(),
)


class Requests(threading.Thread):
    """Sends one request after the other until it is stopped, and counts the replies."""

    def __init__(self, port: int, seed: int = 0):
        super().__init__()
        self.port, self.rng = port, random.Random(seed)
        self.stop, self.stopping = threading.Event(), threading.Event()
        self.counts: Counter = Counter()
        self.errors: list[str] = []

    def run(self) -> None:
        while not self.stopping.is_set():
            try:
                self.one()
            except (OSError, http.client.HTTPException) as error:
                if not self.stopping.is_set():
                    self.failed(error)

    def one(self) -> None:
        """Send a request."""
        raise NotImplementedError

    def failed(self, error: Exception) -> None:
        """A request got no reply."""
        self.errors.append(f"{type(self).__name__}: {type(error).__name__}: {error}")

    def ask(self, method: str, path: str, body: bytes | None = None, **more) -> int:
        """The status of the reply to a request on a connection of its own."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60, **more)
        try:
            connection.request(method, path, body, JSON)
            reply = connection.getresponse()
            reply.read()
            return reply.status
        finally:
            connection.close()


class Searcher(Requests):
    """Uses the search page as it is meant to be used."""

    def one(self) -> None:
        query = " ".join(f"w{self.rng.randrange(USED)}" for _ in range(4))
        images = [self.rng.randrange(10) for _ in range(3)]
        requests = (
            ("GET", "/", None),
            ("GET", "/api/info", None),
            ("GET", f"/api/captions?image={images[0]}", None),
            ("POST", SEARCH, {"query": query}),
            ("POST", "/api/attention", {"query": query, "images": images}),
        )
        method, path, body = self.rng.choice(requests)
        status = self.ask(method, path, None if body is None else json.dumps(body).encode())
        self.counts[str(status)] += 1
        if status != 200:
            self.errors.append(f"Searcher: {method} {path}: {status}")
        time.sleep(0.01)


class Hostile(Requests):
    """Sends bodies that are none, announces too much, and leaves half-way."""

    def one(self) -> None:
        tricks = self.no_body, self.no_body, self.too_large, self.half_body, self.half_header
        self.rng.choice(tricks)()
        time.sleep(0.02)

    def failed(self, error: Exception) -> None:
        self.counts["cut off"] += 1  # as the server may

    def no_body(self) -> None:
        path = self.rng.choice((SCORES, SEARCH, "/api/attention"))
        body = self.rng.choice(NO_BODIES)
        status = self.ask("POST", path, body, source_address=THEIR_ADDRESS)
        self.counts[str(status)] += 1
        if not (400 <= status < 500 or status == 503):
            self.errors.append(f"Hostile: {path}: {status} to {body[:40]!r}")

    def too_large(self) -> None:
        self.raw(b"content-length: 1000000000000\r\n\r\n{", wait=True)

    def half_body(self) -> None:
        self.raw(b"content-length: 1000\r\n\r\n" + b'{"sentence": [' * 10)

    def half_header(self) -> None:
        self.raw(b"x-more: " + b"y" * 1000)

    def raw(self, rest: bytes, wait: bool = False) -> None:
        """Send the start of a request; leave after a while, or when the reply begins."""
        head = f"POST {SCORES} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        address = "127.0.0.1", self.port
        with socket.create_connection(address, 60, source_address=THEIR_ADDRESS) as sock:
            sock.sendall(head.encode() + rest)
            if wait:
                self.counts[sock.recv(12)[9:].decode() or "cut off"] += 1
            else:
                time.sleep(self.rng.uniform(0, 0.5))
                with suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
                self.counts["left half-way"] += 1
