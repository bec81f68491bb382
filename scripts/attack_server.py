"""Attack serve.py from this machine, and measure how good clients fare meanwhile.

    python scripts/attack_server.py                       # random pfan_whole, published size
    python scripts/attack_server.py --seconds 20 --only headers

The script starts serve.py in its own process with at most 1,024 open files, and asks it from four
good clients, each time over a new connection. Each attack goes on for --seconds: what is refused or
cut off comes again at once. The script prints a table, and exits with status 1 if a good client was
refused or waited longer than --bound. Attackers and good clients have one address: what the server
grants each address alone does not help the good ones here.
"""

import asyncio
import contextlib
import http.client
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import serve
from scripts.load_server import memory_mib, random_bodies, random_checkpoint, start_server
from util.arguments import Parser
from util.cli import InputError, run

PATH = "/scan_sentence_image_score"
OPEN_FILES = 1024  # of the server, as most systems allow
GOOD_CLIENTS = 4
ROWS = "{:42s} | {:>7s} | {:>7s} | {:>7s} | {:>8s} | {}"


class Attack(NamedTuple):
    """What each of some clients sends: `first`, and then `drip` again and again."""

    what: str
    clients: int
    first: bytes
    drip: bytes = b""
    pause: float = 0.5  # seconds before each drip
    reads: bool = True  # whether it reads the answer


def head(length: int) -> bytes:
    """The headers of a request with a body."""
    return (
        f"POST {PATH} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        f"content-length: {length}\r\n\r\n"
    ).encode()


def attacks() -> dict[str, Attack]:
    """The attacks by name."""
    values = b'{"x": [' + b"[]," * (19 * 2**20) + b"[]]}"  # 57 MiB
    asked = b"GET /openapi.json HTTP/1.1\r\nhost: localhost\r\n\r\n"
    return {
        "none": Attack("none", 0, b""),
        "values": Attack("bodies of 57 MiB of `[],`", 4, head(len(values)) + values),
        "trickle": Attack("bodies that trickle", 64, head(10**6), b" "),
        "many": Attack("many bodies that trickle", 1100, head(10**6), b" "),
        "large": Attack(
            "40 MiB of a body, then a trickle", 16, head(2**26) + bytes(40 * 2**20), b" "
        ),
        "headers": Attack("headers that never end", 1100, b"GET / HTTP/1.1\r\n", b"a: b\r\n", 1),
        "idle": Attack("connections without a request", 1100, b""),
        "unread": Attack("answers that are never read", 64, asked * 1000, reads=False),
    }


async def drip(writer: asyncio.StreamWriter, attack: Attack) -> None:
    """Send the rest of an attack until the connection ends."""
    while True:
        await asyncio.sleep(attack.pause)
        writer.write(attack.drip)
        await writer.drain()


async def attack_once(port: int, attack: Attack) -> str:
    """Attack over one connection: the status of the answer, or how it ended."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    slowly = asyncio.ensure_future(drip(writer, attack))
    try:
        writer.write(attack.first)
        if not attack.reads:
            writer.transport.pause_reading()
            await slowly
        line = await reader.readline()
        return line.split()[1].decode() if line.startswith(b"HTTP/") else "closed"
    finally:
        slowly.cancel()
        writer.transport.abort()


async def attack_on(port: int, attack: Attack, got: Counter) -> None:
    """Attack again and again, and count what comes of it."""
    while True:
        try:
            got[await attack_once(port, attack)] += 1
        except OSError as error:
            got["closed" if isinstance(error, ConnectionError) else type(error).__name__] += 1
            await asyncio.sleep(0.05)


async def attack_for(port: int, name: str, seconds: float) -> Counter:
    """All clients of an attack, for some seconds: what they got."""
    attack, got = attacks()[name], Counter()
    tasks = [asyncio.ensure_future(attack_on(port, attack, got)) for _ in range(attack.clients)]
    await asyncio.sleep(seconds)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return got


def attack_process(port: int, name: str, seconds: float) -> Counter:
    """An attack in a process of its own, which does not slow the good clients down."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(files, 8192), files))
    return asyncio.run(attack_for(port, name, seconds))


class GoodClient(threading.Thread):
    """Asks for scores and for /health in turn, until it is stopped."""

    def __init__(self, port: int, body: bytes):
        super().__init__()
        self.port, self.body, self.done = port, body, threading.Event()
        self.times: list[float] = []
        self.errors: list[str] = []

    def run(self) -> None:
        while not self.done.is_set():
            for asked in (("POST", PATH, self.body), ("GET", "/health")):
                start = time.perf_counter()
                try:
                    self.ask(*asked)
                except (OSError, http.client.HTTPException, InputError) as error:
                    self.errors.append(f"{type(error).__name__}: {error}")
                self.times.append(time.perf_counter() - start)
            self.done.wait(0.1)

    def ask(self, method: str, path: str, body: bytes | None = None) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        with contextlib.closing(connection):
            connection.request(method, path, body, {"content-type": "application/json"})
            reply = connection.getresponse()
            answer = json.load(reply)
        if reply.status != 200:
            raise InputError(f"{reply.status}: {answer}")


class Found(NamedTuple):
    """How good clients fared beside an attack, and the attackers."""

    times: list[float]
    errors: list[str]
    memory: float  # of the server, MiB at most
    got: Counter


def measure(server: subprocess.Popen, port: int, body: bytes, name: str, seconds: float) -> Found:
    """Run good clients beside an attack."""
    good, memory = [GoodClient(port, body) for _ in range(GOOD_CLIENTS)], []
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        attack = pool.submit(attack_process, port, name, seconds)
        for client in good:
            client.start()
        while not attack.done():
            time.sleep(0.05)
            memory.append(memory_mib(server.pid))
        for client in good:
            client.done.set()
        for client in good:
            client.join()
    times = sorted(t for client in good for t in client.times)
    errors = [error for client in good for error in client.errors]
    return Found(times, errors, max(memory), attack.result())


def print_row(attack: Attack, found: Found) -> None:
    """Print a row of the table, and the first errors of good clients."""
    middle, worst = statistics.median(found.times), found.times[-1]
    cells = str(attack.clients), f"{middle:.2f} s", f"{worst:.2f} s", f"{found.memory:.0f} MiB"
    got = ", ".join(f"{count:,} x {status}" for status, count in found.got.most_common(4))
    print(ROWS.format(attack.what, *cells, got or "nothing yet"), flush=True)
    for error in found.errors[:3]:
        print(f"  good client, 1 of {len(found.errors)}: {error[:200]}", flush=True)


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", nargs="?", help="default: a pfan_whole with random weights")
    parser.add_argument("--seconds", type=float, default=20, help="of each attack")
    parser.add_argument("--bound", type=float, default=2, help="seconds a good client may wait")
    parser.add_argument("--only", nargs="+", choices=list(attacks()), help="some of the attacks")
    opt = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        path = opt.checkpoint
        if path is None:
            path = f"{folder}/random.pth.tar"
            random_checkpoint(path)
        body = random_bodies(serve.Scorer(path, None, torch.device("cpu"), serve.Limits()), 1)[0]
        files = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (OPEN_FILES, files[1]))  # the server takes it on
        server, port = start_server(path)
        resource.setrlimit(resource.RLIMIT_NOFILE, files)
        failed = False
        try:
            print(ROWS.format("attack", "clients", "median", "worst", "memory", "attackers got"))
            for name in opt.only or attacks():
                found = measure(server, port, body, name, opt.seconds)
                print_row(attacks()[name], found)
                failed |= bool(found.errors) or found.times[-1] > opt.bound
        finally:
            server.terminate()
            server.wait(120)
    sys.exit(failed)


if __name__ == "__main__":
    run(main)
