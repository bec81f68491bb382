"""Test serve.py under load: many clients for a minute; compare each answer, watch the memory.

    python scripts/load_server.py                              # random pfan_whole, published size
    python scripts/load_server.py runs/x/model_best.pth.tar --clients 32 --seconds 60

The script starts serve.py in its own process. It draws the requests once: sentences of 9 to 21
words, each with --images images of 36 random regions. At the end it sends SIGTERM while the clients
continue: the server must still answer the requests that it has. The script prints throughput,
latency and memory, and exits with status 1 on any error.
"""

import base64
import http.client
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import checkpoint as ckpt
import options
import serve
from util.arguments import Parser
from util.cli import InputError, run
from vocab import SPECIAL, Vocabulary

REGIONS, N_VOCAB, BODIES = 36, 8481, 16


def random_checkpoint(path: str) -> None:
    """Write a checkpoint of a pfan_whole of published size with random weights."""
    opt = options.parse("--model pfan_whole --bi_gru".split())
    vocab = Vocabulary("one_sentence")
    for word in [*SPECIAL, *(f"w{k}" for k in range(N_VOCAB - len(SPECIAL)))]:
        vocab.add_word(word)
    model = ckpt.build_model(opt, len(vocab))
    state = {"epoch": 0, "model": ckpt.state_dicts(model, opt), "opt": opt}
    torch.save(state | {"vocab": vocab.state_dict()}, path)


def random_bodies(scorer: serve.Scorer, images: int) -> list[bytes]:
    """Random requests that the checkpoint can answer."""
    rng, words = np.random.default_rng(0), list(scorer.vocab.word2idx)
    img_dim = scorer.opt.img_dim

    def b64(array: np.ndarray) -> str:
        return base64.b64encode(array.astype("<f4").tobytes()).decode()

    bodies = []
    for _ in range(BODIES):
        records = []
        for k in range(images):
            corners = np.sort(rng.random((REGIONS, 2, 2)), 1) * [640, 480]
            record = {"image_id": k, "image_w": 640, "image_h": 480, "num_boxes": REGIONS}
            features = rng.random((REGIONS, img_dim))
            records.append(record | {"boxes": b64(corners), "features": b64(features)})
        sentence = rng.choice(words[len(SPECIAL) :], rng.integers(9, 22)).tolist()
        whole = rng.random((images, img_dim)).round(6).tolist()
        body = {"sentence": sentence, "boxes": records, "whole_items": whole}
        bodies.append(json.dumps(body).encode())
    try:
        scorer.read(bodies[0])
    except serve.Refused as error:  # a sparse GSMN needs dependencies
        raise InputError(f"random sentences do not suit this model: {error}") from None
    return bodies


def memory_mib(pid: int) -> float:
    """The resident memory of a process, in MiB (Linux)."""
    with open(f"/proc/{pid}/status") as lines:
        return next(int(x.split()[1]) for x in lines if x.startswith("VmRSS")) / 1024


class Client(threading.Thread):
    """Sends one request after the other over one connection, until it is stopped."""

    def __init__(self, number: int, port: int, bodies: list[bytes], want: list[dict]):
        super().__init__()
        self.number, self.port, self.bodies, self.want = number, port, bodies, want
        self.stop, self.stopping = threading.Event(), threading.Event()
        self.times: list[float] = []
        self.errors: list[str] = []
        self.closed, self.worst = 0, 0.0

    def run(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        turn = self.number
        while not self.stop.is_set():
            turn = (turn + 1) % len(self.bodies)
            start = time.perf_counter()
            try:
                connection.connect() if connection.sock is None else None
            except OSError as error:
                if self.stopping.is_set():  # the port is closed, as it should be
                    return
                self.errors.append(f"no connection: {error}")
                return
            try:
                headers = {"content-type": "application/json"}
                path = "/scan_sentence_image_score"
                connection.request("POST", path, self.bodies[turn], headers)
                reply = connection.getresponse()
                answer = json.load(reply)
                if reply.status != 200:
                    self.errors.append(f"{reply.status}: {answer}")
                    continue
            except (OSError, http.client.HTTPException, ValueError) as error:
                # When the server stops, it closes idle connections between two requests.
                if self.stopping.is_set():
                    self.closed += 1
                    return
                self.errors.append(f"{type(error).__name__}: {error}")
                return
            self.times.append(time.perf_counter() - start)
            for name, scores in self.want[turn].items():
                off = np.abs(np.array(answer[name]) - scores).max()
                self.worst = max(self.worst, float(off))


def start_server(path: str) -> tuple[subprocess.Popen, int]:
    """Start serve.py with a checkpoint; return its process and its port."""
    command = [sys.executable, ROOT / "serve.py", path, "--port", "0", "--device", "cpu"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    line = server.stdout.readline()
    if "http://" not in line:
        raise InputError("the server did not start")
    return server, int(line.partition("http://127.0.0.1:")[2].split()[0])


def print_latency_and_memory(times: list[float], memory: list[float]) -> None:
    """Print the quantiles of the sorted times, and the memory early, at the end and at its peak."""
    tenth = max(1, len(memory) // 10)
    early = memory[tenth : 3 * tenth] or memory
    shown = {"median": 0.5, "95 %": 0.95, "99 %": 0.99}
    parts = [f"{name} {times[int(part * (len(times) - 1))]:.2f} s" for name, part in shown.items()]
    print(f"latency: {', '.join(parts)}, longest {times[-1]:.2f} s")
    first = statistics.median(early)
    last = statistics.median(memory[-tenth:])
    print(f"memory: {first:.0f} MiB early, {last:.0f} MiB at the end, peak {max(memory):.0f} MiB")


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", nargs="?", help="default: a pfan_whole with random weights")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--images", type=int, default=10, help="images per request")
    opt = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        path = opt.checkpoint
        if path is None:
            path = f"{folder}/random.pth.tar"
            random_checkpoint(path)
        scorer = serve.Scorer(path, None, torch.device("cpu"), serve.Limits())
        bodies = random_bodies(scorer, opt.images)
        want = [scorer.score([scorer.read(body)])[0] for body in bodies]
        del scorer
        server, port = start_server(path)
        clients = [Client(k, port, bodies, want) for k in range(opt.clients)]
        try:
            for client in clients:
                client.start()
            memory, start = [memory_mib(server.pid)], time.perf_counter()
            while time.perf_counter() - start < opt.seconds and server.poll() is None:
                time.sleep(1)
                memory.append(memory_mib(server.pid))
            seconds = time.perf_counter() - start
            times = [t for client in clients for t in list(client.times)]
            for client in clients:
                client.stopping.set()
            server.send_signal(signal.SIGTERM)
            code = server.wait(120)
        finally:
            server.kill()
            for client in clients:
                client.stopping.set()
                client.stop.set()
                client.join()
    if not times:
        raise InputError(f"no answers: {clients[0].errors[:1]}")
    errors = [error for client in clients for error in client.errors]
    times.sort()
    print(
        f"{opt.clients} clients, {opt.images} images per request of {len(bodies[0]) / 1e6:.1f} MB"
    )
    print(
        f"{len(times)} answers in {seconds:.0f} s: {len(times) / seconds:.1f} requests per second"
    )
    print_latency_and_memory(times, memory)
    print(f"largest difference from scoring alone: {max(client.worst for client in clients):.1e}")
    closed = sum(client.closed for client in clients)
    print(
        f"errors: {len(errors)}; exit status on SIGTERM: {code}; idle connections closed: {closed}"
    )
    for error in errors[:5]:
        print(error, file=sys.stderr)
    sys.exit(bool(errors or code))


if __name__ == "__main__":
    run(main)
