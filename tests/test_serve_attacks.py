"""The server beside hostile clients: good clients are answered, and the hostile ones cut off."""

import asyncio
import contextlib
import http.client
import json
import os
import shutil
import socket
import subprocess
import time

import pytest

pytest.importorskip("fastapi", reason="pip install fastapi uvicorn")

import uvicorn  # noqa: E402

import serve  # noqa: E402
from serve_schema import parse_body  # noqa: E402
from tests.serving import ROOT, WHOLE, in_thread, make_body, make_scorer, write_checkpoint  # noqa: E402
from util.cli import InputError  # noqa: E402
from util.connections import ConnectionLimits, Connections, fitting_limits  # noqa: E402
from util.request_bodies import Bodies, Refused, Turns  # noqa: E402

PATH = "/scan_sentence_image_score"
HEAD = f"POST {PATH} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
PATIENT = ConnectionLimits(header_seconds=60, answer_seconds=60)
SHORT = ConnectionLimits(header_seconds=0.5, answer_seconds=0.5)


def ask(port: int, body=None, path=PATH, **headers) -> tuple[int, dict]:
    """The reply to a good client, over a new connection."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    with contextlib.closing(connection):
        headers = {"content-type": "application/json"} | headers
        method, raw = ("GET", None) if body is None else ("POST", json.dumps(body))
        connection.request(method, path, raw, headers)
        reply = connection.getresponse()
        return reply.status, json.load(reply)


class Hostile:
    """Clients that each send `first`, and can send more; they end with the block."""

    def __init__(self, port: int, n: int, first: bytes):
        self.sockets = []
        for _ in range(n):
            sock = socket.create_connection(("127.0.0.1", port), timeout=30)
            sock.sendall(first)
            self.sockets.append(sock)

    def __enter__(self) -> "Hostile":
        return self

    def __exit__(self, *error) -> None:
        for sock in self.sockets:
            sock.close()

    def reply(self, number: int = 0, drip: bytes = b"") -> bytes:
        """All that the server says to one until it closes the connection."""
        sock, said, end = self.sockets[number], b"", time.monotonic() + 30
        sock.settimeout(0.1)
        while time.monotonic() < end:
            try:
                if drip:
                    sock.sendall(drip)
                more = sock.recv(2**16)
            except TimeoutError:
                continue
            except ConnectionError:
                return said
            if not more:
                return said
            said += more
        raise AssertionError(f"the connection is open after 30 s: {said[:200]}")

    def is_open(self, number: int) -> bool:
        """Whether the server keeps a connection, to which it has said nothing."""
        self.sockets[number].settimeout(0.2)
        try:
            return bool(self.sockets[number].recv(1))
        except TimeoutError:
            return True
        except ConnectionError:
            return False


STALLED = {  # name: (what is sent first, then again and again; a part of the reply)
    "nothing": (b"", b"", b""),
    "half a line": (b"GET / HT", b"", b" 408 "),
    "headers that never end": (b"GET / HTTP/1.1\r\n", b"a: b\r\n", b" 408 "),
    "empty lines": (b"\r\n", b"\r\n", b" 400 "),
    "nothing after an answer": (b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n", b"", b" 200 "),
    "a second request that never ends": (
        b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\nGET /",
        b"a",
        b" 408 ",
    ),
    "a body that is not asked for": (
        b"GET /health HTTP/1.1\r\nhost: localhost\r\ncontent-length: 10000\r\n\r\n",
        b"a",
        b" 200 ",
    ),
}


def test_clients_that_stall_are_cut_off(tiny_positions):
    with in_thread(serve.Limits(), SHORT) as (port, _), contextlib.ExitStack() as stack:
        clients = {}
        for name, (first, _, _) in STALLED.items():
            clients[name] = stack.enter_context(Hostile(port, 1, first))
        assert ask(port, make_body())[0] == 200
        for name, (_, drip, said) in STALLED.items():
            assert said in clients[name].reply(0, drip), name
        assert ask(port, path="/health")[1]["waiting"] == 0


def test_a_client_that_reads_no_answer_is_cut_off(tiny_positions):
    asked = b"GET /openapi.json HTTP/1.1\r\nhost: localhost\r\n\r\n"
    with in_thread(serve.Limits(), SHORT) as (port, _):
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.settimeout(30)
        sock.connect(("127.0.0.1", port))
        with sock, pytest.raises(ConnectionError):
            while True:  # until the server reads no more, and then ends it
                sock.sendall(asked * 100)
        assert ask(port, make_body())[0] == 200


def test_the_connection_that_waits_longest_gives_way(tiny_positions):
    limits = PATIENT._replace(open=8)
    partial = f"{HEAD}content-length: 999\r\n\r\n".encode()
    with (
        in_thread(serve.Limits(), limits) as (port, _),
        Hostile(port, 3, b"GET / HTTP/1.1\r\n") as headers,
        Hostile(port, 5, partial) as bodies,
    ):
        for k in range(4):
            assert ask(port, make_body(k))[0] == 200
        assert not any(headers.is_open(k) for k in range(1))
        assert bodies.is_open(4)  # a good client left before the next one came
        with Hostile(port, 20, b"") as many:
            assert ask(port, make_body())[0] == 200
            assert not bodies.is_open(4) and not many.is_open(0) and many.is_open(19)


def test_an_address_with_many_connections_gives_way_first(monkeypatch):
    class Connection:
        transport = property(lambda self: self)

        def __init__(self, address, waits=True):
            self.address, self.waits, self.gone = address, waits, False

        def abort(self):
            self.gone = True

    async def go():
        pool = Connections(ConnectionLimits(open=4))
        monkeypatch.setattr(pool, "sweep", lambda: None)
        busy, quiet = Connection("a", waits=False), Connection("b")
        many = [Connection("a") for _ in range(5)]
        for one in (quiet, busy, *many):
            pool.add(one)
        assert [one.gone for one in (quiet, busy, *many)] == [False] * 2 + [True] * 3 + [False] * 2
        pool.renew(many[3])  # it has had an answer since
        pool.add(Connection("c"))
        assert many[4].gone and not many[3].gone
        assert len(pool.open) == 4 == sum(pool.of_address.values())

    asyncio.run(go())


def test_bodies_that_trickle_take_no_turn(tiny_positions):
    limits = serve.Limits(waiting=2, grace=1.5, rate=1000)
    with in_thread(limits, PATIENT) as (port, _):
        with Hostile(port, 6, f"{HEAD}content-length: 99999\r\n\r\n[".encode()) as clients:
            assert ask(port, make_body())[0] == 200
            assert ask(port, path="/health")[1]["waiting"] == 6
            for k in range(6):
                said = clients.reply(k, b" ")
                assert b" 408 " in said and b"expected 1000 a second" in said
        assert ask(port, path="/health")[1]["waiting"] == 0


def test_unfinished_bodies_give_way(tiny_positions):
    raw = json.dumps(make_body()).encode()
    limits = serve.Limits(held_bytes=3 * len(raw))
    with in_thread(limits, PATIENT) as (port, scorer):
        first = f"{HEAD}content-length: {2 * len(raw)}\r\n\r\n".encode() + raw
        with Hostile(port, 3, first) as clients:
            while ask(port, path="/health")[1]["waiting"] < 3:
                time.sleep(0.02)
            assert ask(port, make_body())[0] == 200
            said = clients.reply(0)
            assert b" 503 " in said and b"too many large requests" in said
            assert clients.is_open(1) and clients.is_open(2)


class Client:
    """A request of some address."""

    def __init__(self, host: str):
        self.client = self
        self.host = host


def test_an_address_with_many_turns_gives_way():
    async def go():
        turns, ended = Turns(3), asyncio.Event()

        async def take(host):
            try:
                async with turns.take(Client(host), 20):
                    await ended.wait()
                return 200
            except Refused as refused:
                return refused.status

        jobs = [asyncio.ensure_future(take(host)) for host in "aaaabbb"]
        await asyncio.sleep(0)
        while sum(job.done() for job in jobs) < 4:
            await asyncio.sleep(0)
        ended.set()
        # The fourth of a finds no turn; one of b gets the third turn of a, the other two none.
        assert await asyncio.gather(*jobs) == [200, 200, 503, 503, 200, 503, 503]
        assert turns.taken == []
        async with turns.take(Client("a"), 20):  # it is free again
            pass
        with pytest.raises(Refused, match="no answer in 0.01 s") as late:
            async with turns.take(Client("a"), 0.01):
                await asyncio.sleep(20)
        assert late.value.status == 504

    asyncio.run(go())


def test_an_address_with_many_bytes_gives_way():
    class Sender(Client):
        headers = {"content-type": "application/json"}

        def __init__(self, host, size):
            super().__init__(host)
            self.size = size

        async def stream(self):
            yield bytes(self.size)
            await ended.wait()

    async def read(sender, bodies):
        try:
            async with bodies.read(sender, "application/json", 100, 20) as raw:
                return len(raw)
        except Refused as refused:
            return refused.status

    async def go():
        bodies = Bodies(held_bytes=100, rate=1, grace=20)
        senders = [Sender("b", 30), Sender("a", 40), Sender("a", 20), Sender("b", 30)]
        jobs = [asyncio.ensure_future(read(sender, bodies)) for sender in senders]
        await asyncio.wait_for(jobs[1], 20)
        assert bodies.held == 80
        ended.set()
        assert await asyncio.gather(*jobs) == [30, 503, 20, 30]
        assert bodies.held == 0 and not bodies.coming

    ended = asyncio.Event()
    asyncio.run(go())


N = 10**5
TOO_MUCH = {
    "empty lists": b'{"x": [' + b"[]," * N + b"[]]}",
    "empty objects": b"[" + b"{}," * N + b"{}]",
    "numbers": b'{"x": [' + b"1," * 4 * N + b"1]}",
    "strings": b'{"sentence": ["a"], "x": [' + b'"",' * 4 * N + b'""]}',
    "fields": b"{" + b",".join(b'"%d":0' % k for k in range(N)) + b"}",
    "fields of one name": b'{"boxes": [{' + b",".join([b'"a":0'] * N) + b"}]}",
    "depth": b"[" * N,
    "depth of objects": b'{"a":' * N,
    "depth in a field": b'{"sentence": ["a"], "boxes": ' + b"[" * N + b"]" * N + b"}",
    "pairs": b'{"sentence": ["a"], "dependencies": [' + b"[0,1]," * N + b"[0,1]]}",
}


@pytest.mark.parametrize("raw", TOO_MUCH.values(), ids=TOO_MUCH)
def test_a_body_of_many_values_is_not_parsed(monkeypatch, raw):
    monkeypatch.setattr(serve.Body, "model_validate_json", None)  # it is not called
    with pytest.raises(InputError, match="over 150000 values, or 30000 fields and lists$") as said:
        parse_body(raw, 150_000, 30_000)
    assert "\n" not in str(said.value) and len(str(said.value)) < 400


def test_the_largest_bodies_are_parsed(tiny_positions):
    """All limits at once: images, numbers of the whole images, words, dependencies."""
    scorer = make_scorer(write_checkpoint(WHOLE | {"img_dim": 2048}))
    record = make_body()["boxes"][0] | {"objects": list(range(36)), "note": "a, b: [c]" * 5}
    body = {
        "sentence": ["dog"] * scorer.limits.words,
        "boxes": [record] * scorer.limits.images,
        "whole_items": [[0.123456] * 2048] * scorer.limits.images,
        "dependencies": [[0, 1]] * 256,
    }
    with pytest.raises(Refused, match=r"258 words|boxes\.0: features"):  # it was parsed
        scorer.read(json.dumps(body).encode())


ODD = {
    "a byte order mark": (b"\xef\xbb\xbf{}", 422),
    "UTF-16": ('{"sentence": ["a"]}'.encode("utf-16"), 422),
    "not UTF-8": (b'{"sentence": ["\xff"], "x": "\xc3\x28"}', 422),
    "half a character": (b'{"sentence": ["\\ud800"]}', 422),
    "a zero byte": (b'{"sentence": ["a"]}\0', 422),
    "two values": (b"{}{}", 422),
    "NaN": (b'{"sentence": [NaN], "boxes": NaN}', 422),
    "Infinity": (b'{"sentence": Infinity, "boxes": -Infinity}', 422),
    "5,000 digits": (b'{"sentence": ["a"], "boxes": ' + b"7" * 5000 + b"}", 422),
    "5,000 digits of a field that is not read": (b'{"x": ' + b"7" * 5000 + b"}", 422),
    "a fraction of 5,000 digits": (b'{"boxes": 0.' + b"7" * 5000 + b"}", 422),
    "a field twice": (b'{"sentence": 1, "sentence": 2}', 422),
    "spaces": (b" " * 10**6, 422),
    "57 MiB of lists": (b'{"x": [' + b"[]," * (19 * 2**20) + b"[]]}", 422),
}


def test_odd_bodies_are_refused_in_one_line(tiny_positions):
    with in_thread(serve.Limits(), PATIENT) as (port, _):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        for name, (raw, status) in ODD.items():
            connection.request("POST", PATH, raw, {"content-type": "application/json"})
            reply = connection.getresponse()
            answer = json.load(reply)
            assert reply.status == status and answer.keys() == {"error"}, (name, answer)
            assert "\n" not in answer["error"] and len(answer["error"]) < 500, name
        connection.close()


OTHER_SITES = ("evil.example", "evil.example:5091", "127.0.0.1.evil.example", "[x", "::1", "a.")


def test_a_name_of_another_site_is_refused_on_every_route(tiny_positions):
    paths = ("/health", "/docs", "/openapi.json", PATH, "/", "/nothing")
    with in_thread(serve.Limits(), PATIENT, hosts=("photos.example.org",)) as (port, _):
        for path in paths:
            for host in OTHER_SITES:
                status, answer = ask(port, path=path, host=host)
                assert status == 403 and "not a name of this server" in answer["error"]
        for host in ("127.0.0.1:1", "[::1]:5091", "localhost", "gpu7", "Photos.example.org:80"):
            assert ask(port, path="/health", host=host)[0] == 200
        assert ask(port, make_body(), host="evil.example")[0] == 403


def test_the_program_runs_with_these_limits(tiny_positions, monkeypatch, capsys):
    configs = []

    class Server:
        def __init__(self, config):
            configs.append(config)

        def run(self, sockets):
            sockets[0].close()

    monkeypatch.setattr(uvicorn, "Server", Server)
    serve.main([write_checkpoint(WHOLE), "--port", "0", "--device", "cpu"])
    pool = configs[0].http.__self__
    assert isinstance(pool, Connections) and pool.limits == fitting_limits()
    assert pool.limits.open > 20 and "stopped" in capsys.readouterr().out


@pytest.mark.skipif(shutil.which("nginx") is None, reason="apt-get install nginx-light")
def test_the_example_of_a_proxy(tiny_positions):
    text = (ROOT / "scripts" / "nginx_example.conf").read_text()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        outside = free.getsockname()[1]
    with in_thread(serve.Limits(), PATIENT, hosts=("scores.example.org",)) as (inside, _):
        for old, new in (("8080", f"127.0.0.1:{outside}"), ("5091", str(inside)), (" 10s", " 1s")):
            assert old in text
            text = text.replace(old, new)
        (tiny_positions / "nginx.conf").write_text(text)
        command = ["nginx", "-p", str(tiny_positions), "-c", str(tiny_positions / "nginx.conf")]
        more = "daemon off;" + (" user root;" if os.getuid() == 0 else "")  # for its folders here
        proxy = subprocess.Popen([*command, "-g", more], stderr=subprocess.DEVNULL)
        try:
            end = time.monotonic() + 30
            while socket.socket().connect_ex(("127.0.0.1", outside)) and time.monotonic() < end:
                time.sleep(0.05)
            assert ask(outside, make_body(), host="scores.example.org")[0] == 200
            partial = f"{HEAD}content-length: 99999\r\n\r\n[".encode()
            with Hostile(outside, 20, partial) as bodies, Hostile(outside, 99, b"GET /") as headers:
                assert ask(outside, make_body())[0] == 200
                assert ask(inside, path="/health")[1]["waiting"] == 0  # they do not reach it
                bodies.reply(19)  # it ends
                headers.reply(98)
            assert ask(outside, path="/health", host="evil.example")[0] == 403
        finally:
            proxy.terminate()
            proxy.wait(30)
