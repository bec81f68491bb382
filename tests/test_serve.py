"""The server: answers what evaluation computes, whatever it is sent, until it is stopped."""

import argparse
import asyncio
import base64
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

import checkpoint as ckpt
import evaluation
import options
from data import open_split
from scripts import load_server, query_server, tencent_map
from util import positions
from vocab import deserialize_vocab

pytest.importorskip("fastapi", reason="pip install fastapi uvicorn")

import serve  # noqa: E402

ROOT = Path(__file__).parent.parent
SIZES = {
    "img_dim": 12,
    "embed_size": 16,
    "word_dim": 8,
    "bi_gru": True,
    "data_name": "tiny_precomp",
}
GSMN = {"model": "gsmn", "num_block": 4, "feat_dim": 4, "hid_dim": 16}
SYSTEMS = [
    {"model": "scan", "cross_attn": "t2i"},
    {"model": "scan", "cross_attn": "i2t"},
    GSMN,
    GSMN | {"is_sparse": True},
    GSMN | {"is_sparse": True, "neighbours": True},
    {"model": "pfan"},
    {"model": "pfan", "cross_attn": "i2t", "position": "only", "split_size": 5, "n_blocks": 4},
    {"model": "pfan_whole", "lambda_whole": 2.0},
    {"model": "pfan_whole", "cross_attn": "i2t", "need_box_whole": True},
    {"model": "chan", "precomp_enc_type": "selfattention"},
]
WHOLE = {"model": "pfan_whole", "lambda_whole": 2.0}


def write_checkpoint(system: dict, path: str = "model.pth.tar") -> str:
    """A model of random weights."""
    opt = argparse.Namespace(**options.defaults(system["model"]) | SIZES | system)
    words = ckpt.as_read(deserialize_vocab("vocab/tiny_precomp_vocab.json"), opt)
    torch.manual_seed(0)
    net = ckpt.build_model(opt, len(words))
    state = {"epoch": 0, "model": ckpt.state_dicts(net, opt.model), "opt": opt}
    torch.save(state | {"best_rsum": 0.0, "Eiters": 0, "vocab": words.state_dict()}, path)
    return path


def b64(array) -> str:
    return base64.b64encode(np.ascontiguousarray(array, "<f4").tobytes()).decode()


def make_body(caption: int = 0, images=range(15), **more) -> dict:
    """The request for a caption of the tiny test split and some of its images."""
    stem = "data/tiny_precomp/test"
    features, boxes = np.load(f"{stem}_ims.npy"), np.load(f"{stem}_ims_bbx.npy")
    sizes, whole = np.load(f"{stem}_ims_size.npy"), np.load(f"{stem}_who_ims.npy")
    sentence = Path(f"{stem}_caps.txt").read_text().splitlines()[caption].split()
    records = [
        {
            "image_id": i,
            "image_w": int(sizes[i]["image_w"]),
            "image_h": int(sizes[i]["image_h"]),
            "num_boxes": len(boxes[i]),
            "boxes": b64(boxes[i]),
            "features": b64(features[i]),
        }
        for i in images
    ]
    vectors = [whole[i].tolist() for i in images]
    return {"sentence": sentence, "boxes": records, "whole_items": vectors} | more


def scores_of_evaluation(path: str) -> np.ndarray:
    state = ckpt.load(path)
    words = ckpt.find_vocab(state, path)
    net = ckpt.build_model(state["opt"], len(words))
    ckpt.load_weights(net, state, path)
    data = open_split("data/tiny_precomp", "test", words, state["opt"])
    return evaluation.score_matrix(net, *evaluation.encode_data(net, data))


def make_scorer(path: str) -> serve.Scorer:
    return serve.Scorer(path, None, torch.device("cpu"), serve.Limits())


@pytest.mark.parametrize("system", SYSTEMS, ids=str)
def test_answers_are_what_evaluation_computes(tiny_positions, system):
    path = write_checkpoint(system)
    if "split_size" in system:
        sizes = ["--split_size", str(system["split_size"]), "--n_blocks", str(system["n_blocks"])]
        positions.main(["--data_name", "tiny_precomp", "--overwrite", *sizes])
    scorer, want = make_scorer(path), scores_of_evaluation(path)
    graphs = json.loads(Path("data/tiny_precomp/test_caps.json").read_text())
    queries = []
    for caption in (0, 31, 74):
        more = {"dependencies": graphs[caption]} if system.get("is_sparse") else {}
        queries.append(scorer.read(json.dumps(make_body(caption, **more)).encode()))
    answers = scorer.score(queries)
    own = f"sim_{system.get('cross_attn', 't2i')}"
    for caption, answer in zip((0, 31, 74), answers, strict=True):
        np.testing.assert_allclose(answer[own], want[:, caption], rtol=0, atol=2e-6)
    other = {"t2i": "i2t", "i2t": "t2i"}[own[4:]]
    if system["model"] in ("gsmn", "chan"):  # one score for both directions
        assert answers[0]["sim_t2i"] == answers[0]["sim_i2t"]
    else:
        path = write_checkpoint(system | {"cross_attn": other})
        want = scores_of_evaluation(path)
        np.testing.assert_allclose(answers[1][f"sim_{other}"], want[:, 31], rtol=0, atol=2e-6)


def test_requests_do_not_touch_each_other(tiny_positions):
    scorer = make_scorer(write_checkpoint(WHOLE))
    bodies = [make_body(c, range(c % 3, 15 - c % 4)) for c in range(9)]
    bodies[4]["boxes"][2] |= {  # an image with fewer regions than the others
        "num_boxes": 2,
        "boxes": b64(np.array([[0, 0, 9, 9], [3, 3, 50, 60]])),
        "features": b64(np.ones((2, 12))),
    }
    queries = [scorer.read(json.dumps(body).encode()) for body in bodies]
    together = scorer.score(queries)
    for query, answer in zip(queries, together, strict=True):
        (alone,) = scorer.score([query])
        for name in alone:
            np.testing.assert_allclose(answer[name], alone[name], rtol=0, atol=2e-6)


def test_a_request_that_fails_does_not_fail_its_neighbours(tiny_positions):
    desk = serve.Desk(make_scorer(write_checkpoint(WHOLE)))
    good = desk.scorer.read(json.dumps(make_body()).encode())
    bad = good._replace(images=[{"images": torch.zeros(4, 7)}])
    answers = desk.score([good, bad, good])
    assert isinstance(answers[1], Exception) and answers[0] == answers[2]
    assert answers[0].keys() == {"sim_t2i", "sim_i2t"} and desk.score([]) == []


def memory_mib(pid: int) -> float:
    if not os.path.exists(f"/proc/{pid}/status"):
        return 0.0  # not Linux: not measured
    return load_server.memory_mib(pid)


class Server:
    """serve.py in a process of its own."""

    def __init__(self, path: str, *flags: str):
        self.process = subprocess.Popen(
            [sys.executable, ROOT / "serve.py", path, "--port", "0", *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        line = self.process.stdout.readline()
        while "http://" not in line and line:
            line = self.process.stdout.readline()
        self.port = int(line.partition("http://127.0.0.1:")[2].split()[0])

    def ask(
        self, body=None, raw: bytes | None = None, path="/scan_sentence_image_score", **headers
    ):
        """(status, answer) of a POST; of a GET without a body."""
        data = raw if raw is not None else (None if body is None else json.dumps(body).encode())
        url = f"http://127.0.0.1:{self.port}{path}"
        headers = {"content-type": "application/json"} | headers
        try:
            with urllib.request.urlopen(urllib.request.Request(url, data, headers)) as reply:
                return reply.status, json.load(reply)
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    def send(self, raw: bytes) -> socket.socket:
        sock = socket.create_connection(("127.0.0.1", self.port), timeout=30)
        sock.sendall(raw)
        return sock

    def stop(self) -> tuple[int, str]:
        self.process.send_signal(signal.SIGTERM)
        out = self.process.communicate(timeout=60)[0]
        return self.process.returncode, out


@pytest.fixture
def server(tiny_positions):
    server = Server(write_checkpoint(WHOLE))
    yield server
    server.process.kill()
    server.process.communicate()


def spoiled(change) -> bytes:
    body = make_body(images=range(3))
    change(body)
    return json.dumps(body).encode()


def on_record(**fields):
    return lambda body: body["boxes"][1].update(fields)


HOSTILE = {  # name: (the body, or what to do to a good one; what the answer names)
    "nothing": (b"", "Invalid JSON"),
    "not JSON": (b"sentence=dog", "Invalid JSON"),
    "half of it": (b'{"sentence": ["a"', "Invalid JSON"),
    "not UTF-8": (b'{"sentence": ["\xff\xfe"]}', "Invalid JSON"),
    "half a character": (b'{"sentence": ["\\ud800"], "boxes": []}', "Invalid JSON"),
    "a list": (b"[1, 2]", "Input should be an object"),
    "null": (b"null", "Input should be an object"),
    "deep lists": (b"[" * 200_000, "recursion limit"),
    "deep objects": (b'{"sentence":' * 100_000, "recursion limit"),
    "deep inside": (
        b'{"sentence": ["a"], "boxes": ' + b"[" * 99_999 + b"]" * 99_999 + b"}",
        "recursion limit",
    ),
    "a number without end": (b'{"sentence": ' + b"9" * 100_000 + b"}", "number out of range"),
    "empty": (b"{}", "sentence: Field required; boxes: Field required"),
    "a misspelt field": (lambda b: b.update(sentences=b.pop("sentence")), "sentence: Field requ"),
    "a misspelt field of a record": (
        lambda b: b["boxes"][1].update(Boxes=b["boxes"][1].pop("boxes")),
        "boxes.1.boxes: Field required",
    ),
    "a million empty records": (
        b'{"sentence": ["a"], "boxes": [' + b"{}," * 10**6 + b"{}]}",
        "boxes.0.image_w: Field required",
    ),
    "a million words that are none": (
        b'{"sentence": [' + b"0," * 10**6 + b'0], "boxes": []}',
        "sentence.0: Input should be a valid string",
    ),
    "a million words": (
        b'{"sentence": [' + b'"a",' * 10**6 + b'"a"], "boxes": []}',
        "sentence: List should have at most 65536",
    ),
    "a million unknown fields": (
        b"{" + b",".join(b'"%d":0' % k for k in range(10**6)) + b"}",
        "sentence: Field required",
    ),
    "a long whole image": (
        lambda b: b["whole_items"].__setitem__(0, [0] * 10**6),
        "whole_items.0: List should have at most 65536",
    ),
    "many whole images": (
        lambda b: b.update(whole_items=[[]] * 10**6),
        "whole_items.0: List should have at least 1",
    ),
    "sentence a string": (lambda b: b.update(sentence="a dog"), "sentence: Input should be a"),
    "no words": (lambda b: b.update(sentence=[]), "sentence: List should have at least 1"),
    "words that are numbers": (lambda b: b.update(sentence=[1, 2]), "sentence.0: Input should be"),
    "too many words": (lambda b: b.update(sentence=["dog"] * 300), "expected at most 256"),
    "too long a word": (lambda b: b.update(sentence=["x" * 10**6]), "1000000 characters"),
    "no images": (lambda b: b.update(boxes=[], whole_items=[]), "boxes: List should have at least"),
    "too many images": (
        lambda b: b.update(boxes=b["boxes"] * 100, whole_items=b["whole_items"] * 100),
        "boxes: 300 images, expected at most 256",
    ),
    "a record without features": (lambda b: b["boxes"][2].pop("features"), "boxes.2.features"),
    "boxes a number": (on_record(boxes=7), "boxes.1.boxes: Input should be a valid string"),
    "wrong base64": (on_record(features="@@@@"), "boxes.1: features is not base64"),
    "cut base64": (on_record(features=b64(np.ones((4, 12)))[:-3]), "boxes.1: features"),
    "no base64": (on_record(features=""), "boxes.1: features holds 0 bytes"),
    "features of NaN": (on_record(features=b64(np.full((4, 12), np.nan))), "boxes.1: NaN or Inf"),
    "features of Inf": (on_record(features=b64(np.full((4, 12), np.inf))), "boxes.1: NaN or Inf"),
    "another feature size": (on_record(features=b64(np.ones((4, 11)))), "boxes.1: features holds"),
    "boxes of NaN": (on_record(boxes=b64(np.full((4, 4), np.nan))), "boxes.1: NaN or Inf among"),
    "boxes of five numbers": (on_record(boxes=b64(np.ones((4, 5)))), "boxes.1: boxes holds 80"),
    "more boxes than told": (on_record(num_boxes=3), "boxes.1: boxes holds 64 bytes"),
    "no regions": (on_record(num_boxes=0), "boxes.1.num_boxes"),
    "a billion regions": (on_record(num_boxes=10**9), "boxes.1.num_boxes"),
    "many regions": (on_record(num_boxes=5000), "boxes.1: 5000 regions, expected at most 256"),
    "half a region": (on_record(num_boxes=3.5), "boxes.1.num_boxes"),
    "an image of no width": (on_record(image_w=0), "boxes.1.image_w"),
    "an image of NaN": (on_record(image_h=float("nan")), "boxes.1.image_h"),
    "an image of infinite width": (on_record(image_w=float("inf")), "boxes.1.image_w"),
    "no whole images": (lambda b: b.pop("whole_items"), "whole_items: none, expected one for each"),
    "too few whole images": (lambda b: b["whole_items"].pop(), "whole_items: 2, expected one for"),
    "a short whole image": (lambda b: b["whole_items"][0].pop(), "whole_items.0: 11 numbers"),
    "a whole image of NaN": (
        lambda b: b["whole_items"][1].__setitem__(3, float("nan")),
        "whole_items.1.3: Input should be a finite number",
    ),
    "a whole image of words": (
        lambda b: b["whole_items"][1].__setitem__(3, "x"),
        "whole_items.1.3: Input should be a valid number",
    ),
    "numbers beyond float32": (
        lambda b: b["whole_items"].__setitem__(1, [1e300] * 12),
        "scores are not finite",
    ),
}


def test_hostile_bodies_are_answered_and_survived(server):
    status, want = server.ask(make_body())
    assert status == 200
    assert len(HOSTILE) >= 30
    wrong, before, slowest = {}, memory_mib(server.process.pid), 0.0
    for name, (change, said) in HOSTILE.items():
        raw = change if isinstance(change, bytes) else spoiled(change)
        start = time.monotonic()
        status, answer = server.ask(raw=raw)
        slowest = max(slowest, time.monotonic() - start)
        if status != 422 or set(answer) != {"error"} or said not in answer["error"]:
            wrong[name] = status, answer
        assert len(str(answer)) < 600, name
    assert not wrong
    # Nothing hangs, and nothing that a body names is made: some of them would take gigabytes.
    assert slowest < 60 and memory_mib(server.process.pid) < before + 1000
    unknown = make_body() | {"id": 3, "path": "/etc/passwd"}  # other fields are not read
    unknown["boxes"][0]["attributes"] = [1, 2]
    status, again = server.ask(unknown)
    assert status == 200 and again == want
    status, health = server.ask(path="/health")
    assert status == 200 and (health["status"], health["answered"]) == ("ok", 2)
    code, out = server.stop()
    assert code == 0 and "Traceback" not in out and out.endswith("stopped\n")


def raw_request(server, head: str, body: bytes = b"") -> bytes:
    """What comes back for a request written by hand, up to the end of the connection."""
    sock = server.send(
        f"POST /scan_sentence_image_score HTTP/1.1\r\n{head}\r\n\r\n".encode() + body
    )
    with sock, sock.makefile("rb") as reply:
        return reply.read()


def test_the_size_that_a_request_declares_or_has_is_bounded(server):
    json_head = "host: x\r\ncontent-type: application/json"
    start = time.monotonic()
    got = raw_request(server, f"{json_head}\r\ncontent-length: {2**30}")
    assert b" 413 " in got and b"a body of 1073741824 bytes, expected at most 67108864" in got
    got = raw_request(server, f"{json_head}\r\ncontent-length: {'9' * 30}")
    assert b" 413 " in got or b" 400 " in got
    assert time.monotonic() - start < 60  # without waiting for it
    assert b" 400 " in raw_request(server, f"{json_head}\r\ncontent-length: -5")
    chunk = b"100000\r\n" + b" " * 2**20 + b"\r\n"
    sock = server.send(
        f"POST /scan_sentence_image_score HTTP/1.1\r\n{json_head}\r\n"
        "transfer-encoding: chunked\r\n\r\n".encode()
    )
    with sock:
        try:
            for _ in range(80):
                sock.sendall(chunk)
        except OSError:  # it may hang up on us
            pass
        got = sock.recv(4096)
    assert b" 413 " in got
    assert server.ask(make_body())[0] == 200


def test_a_refusal_reaches_a_client_that_is_still_sending(tiny_positions):
    server = Server(write_checkpoint(WHOLE), "--max_body_mb", "1", "--max_waiting", "1")
    try:
        large = b" " * (30 * 2**20)
        for _ in range(3):
            status, answer = server.ask(raw=large)
            assert status == 413 and "expected at most 1048576" in answer["error"]
        body = json.dumps(make_body(0, [0] * 250)).encode()
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda _: server.ask(raw=body), range(40)))
        statuses = [status for status, _ in answers]
        assert set(statuses) == {200, 503}
    finally:
        server.process.kill()
        server.process.communicate()


def test_replies_on_a_kept_connection_are_not_held_back(server):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    times = []
    for _ in range(20):
        start = time.monotonic()
        connection.request("GET", "/health")
        assert json.load(connection.getresponse())["status"] == "ok"
        times.append(time.monotonic() - start)
    assert min(times) < 0.03  # held back, each waits for a delayed acknowledgement: 40 ms


def test_sigterm_as_soon_as_it_serves(tiny_positions):
    path = write_checkpoint(WHOLE)
    for number in (signal.SIGTERM, signal.SIGINT):
        server = Server(path)
        server.process.send_signal(number)
        out = server.process.communicate(timeout=30)[0]
        assert server.process.returncode == 0 and "Traceback" not in out


def test_other_methods_types_and_places(server):
    assert server.ask(path="/scan_sentence_image_score")[0] == 405
    assert server.ask(path="/other")[0] == 404
    status, answer = server.ask(make_body(), **{"content-type": "text/plain"})
    assert status == 415 and "expected application/json" in answer["error"]
    assert server.ask(make_body(), **{"content-type": "application/json; charset=utf-8"})[0] == 200
    status, described = server.ask(path="/openapi.json")
    post = described["paths"]["/scan_sentence_image_score"]["post"]
    fields = post["requestBody"]["content"]["application/json"]["schema"]["properties"]
    assert {"sentence", "boxes", "whole_items"} <= fields.keys()
    assert "features" in described["components"]["schemas"]["Record"]["properties"]


def test_a_client_that_leaves_or_is_slow_does_no_harm(tiny_positions):
    server = Server(write_checkpoint(WHOLE), "--timeout", "1")
    head = "host: x\r\ncontent-type: application/json\r\ncontent-length: 100"
    got = raw_request(server, head, b'{"sentence"')  # and no more
    assert b" 408 " in got and b"no whole body in 1 s" in got
    for _ in range(20):
        server.send(f"POST /scan_sentence_image_score HTTP/1.1\r\n{head}\r\n\r\n".encode()).close()
    assert server.ask(make_body())[0] == 200
    status, health = server.ask(path="/health")
    assert health["waiting"] == 0
    code, out = server.stop()
    assert code == 0 and "Traceback" not in out


def test_too_much_at_once_is_refused_and_late_answers_are_named(tiny_positions, monkeypatch):
    scorer = make_scorer(write_checkpoint(WHOLE))
    score = scorer.score

    scored = []

    def slowly(queries):
        time.sleep(0.5)
        scored.append(len(queries))
        return score(queries)

    monkeypatch.setattr(scorer, "score", slowly)
    raw = json.dumps(make_body()).encode()

    class Request:
        headers = {"content-type": "application/json"}

        def __init__(self, seconds=60):
            self.seconds = seconds

        async def stream(self):
            yield raw

        async def receive(self):
            await asyncio.sleep(self.seconds)
            return {"type": "http.disconnect"}

    async def go(limits, n, seconds=60):
        scorer.limits = limits
        desk = serve.Desk(scorer)
        work = asyncio.create_task(desk.work())
        answers = await asyncio.gather(
            *(desk.answer(Request(seconds)) for _ in range(n)), return_exceptions=True
        )
        await asyncio.sleep(1)
        work.cancel()
        assert (desk.inside, desk.held) == (0, 0)
        return answers

    answers = asyncio.run(go(serve.Limits(waiting=3), 5))
    refused = [answer for answer in answers if isinstance(answer, serve.Refused)]
    assert [r.status for r in refused] == [503, 503]
    assert len([a for a in answers if isinstance(a, dict)]) == 3
    answers = asyncio.run(go(serve.Limits(held_bytes=2 * len(raw)), 3))
    assert sorted(getattr(a, "status", 200) for a in answers) == [200, 200, 503]
    answers = asyncio.run(go(serve.Limits(seconds=0.2), 2))
    assert [a.status for a in answers] == [504, 504]
    scored.clear()
    answers = asyncio.run(go(serve.Limits(batch=1), 4, seconds=0.2))  # all are gone by then
    assert all(isinstance(a, serve.ClientDisconnect) for a in answers)
    assert sum(scored) == 1  # the others were still waiting


def test_the_worker_outlives_a_failure(tiny_positions, monkeypatch):
    desk = serve.Desk(make_scorer(write_checkpoint(WHOLE)))
    raw = bytearray(json.dumps(make_body()).encode())
    submit = desk.worker.submit

    def once(*args):
        monkeypatch.setattr(desk.worker, "submit", submit)
        raise RuntimeError("can't start new thread")

    async def go():
        work = asyncio.create_task(desk.work())
        monkeypatch.setattr(desk.worker, "submit", once)
        with pytest.raises(RuntimeError, match="new thread"):
            await desk.scores(raw)
        answer = await desk.scores(raw)
        work.cancel()
        return answer

    assert len(asyncio.run(asyncio.wait_for(go(), 20))["sim_t2i"]) == 15  # and does not hang


def test_many_clients_and_sigterm_with_requests_in_flight(server):
    bodies = [make_body(c, range(c % 5, 15)) for c in range(12)]
    want = [server.ask(body)[1] for body in bodies]
    with ThreadPoolExecutor(12) as pool:
        for _ in range(3):
            for got, one in zip(pool.map(server.ask, bodies), want, strict=True):
                assert got[0] == 200
                for name in one:
                    np.testing.assert_allclose(got[1][name], one[name], rtol=0, atol=2e-6)

        # 24 requests have sent all but their last byte when the signal comes.
        data = json.dumps(make_body(0, [k % 15 for k in range(200)])).encode()
        connections, sent = [], threading.Barrier(25)
        for _ in range(24):
            connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
            connection.putrequest("POST", "/scan_sentence_image_score")
            connection.putheader("content-type", "application/json")
            connection.putheader("content-length", str(len(data)))
            connection.endheaders(data[:-1])
            connections.append(connection)

        def finish(connection):
            sent.wait()
            connection.send(data[-1:])
            reply = connection.getresponse()
            return reply.status, len(json.load(reply)["sim_t2i"])

        with ThreadPoolExecutor(24) as many:
            replies = [many.submit(finish, connection) for connection in connections]
            while server.ask(path="/health")[1]["waiting"] < 24:
                time.sleep(0.02)
            sent.wait()
            server.process.send_signal(signal.SIGTERM)
            assert [reply.result() for reply in replies] == [(200, 200)] * 24
    code, out = server.process.wait(60), server.process.stdout.read()
    assert code == 0 and "Traceback" not in out and out.endswith("stopped\n")


def test_a_sparse_gsmn_says_what_it_needs(tiny_positions):
    scorer = make_scorer(write_checkpoint(GSMN | {"is_sparse": True}))
    for more in ({}, {"dependencies": [[0, 99]]}, {"dependencies": [[-1, 2]]}):
        with pytest.raises(serve.Refused, match="dependencies: this model needs them"):
            scorer.read(json.dumps(make_body(**more)).encode())


def test_what_cannot_be_served_is_one_line(tiny_positions, monkeypatch, capsys):
    def run(*args, **env):
        done = subprocess.run(
            [sys.executable, ROOT / "serve.py", *args],
            capture_output=True,
            text=True,
            timeout=60,  # it may serve, where it should have refused
            env=os.environ | env,
        )
        return done.returncode, done.stderr

    assert run("no.pth.tar") == (1, "error: no.pth.tar: no such checkpoint\n")
    path = write_checkpoint(WHOLE)
    for flags in (["--timeout", "0"], ["--timeout", "nan"], ["--max_body_mb", "inf"]):
        code, err = run(path, *flags)
        assert code == 1 and "expected above 0" in err and err.count("\n") == 1
    words = json.loads(Path("vocab/tiny_precomp_vocab.json").read_text()) | {"tokenizer": "jieba"}
    state = torch.load(path, weights_only=False)
    torch.save(state | {"vocab": words}, "chinese.pth.tar")
    (tiny_positions / "no_jieba").mkdir()
    (tiny_positions / "no_jieba" / "jieba.py").write_text("raise ImportError")
    code, err = run("chinese.pth.tar", PYTHONPATH="no_jieba")
    assert code == 1 and "pip install jieba" in err and err.count("\n") == 1
    (tiny_positions / "none" / "fastapi").mkdir(parents=True)
    (tiny_positions / "none" / "fastapi" / "__init__.py").write_text(
        "raise ImportError(name='fastapi')"
    )
    code, err = run(path, PYTHONPATH="none")
    assert code == 1 and err.strip().endswith("pip install fastapi uvicorn") and len(err) < 200
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        code, err = run(path, "--port", str(taken.getsockname()[1]))
        assert code == 1 and "in use" in err and "Traceback" not in err


def write_meta(folder: Path) -> None:
    """The tiny test split as the files of Tencent-News' test set."""
    folder.mkdir()
    body = make_body()
    url = "http://inews.example.com/{}.jpg".format
    with open(folder / "test_own.tsv.0", "w") as tsv:
        for record in body["boxes"][:14]:  # the last image has no features
            tsv.write("\t".join(str(record[name]) for name in query_server.FIELDS) + "\n")
    with open(folder / "test_features.json", "w") as lines:
        for i, vector in enumerate(body["whole_items"]):
            place = "http://inews.example.com/by/url.png" if i == 3 else f"/somewhere/{i}.jpg"
            lines.write(json.dumps([place, vector]) + "\n")
    ids = {url(i): i for i in range(15)} | {"http://inews.example.com/by/url.png": 3}
    (folder / "img_id.txt").write_text("".join(f"{u}\t{i}\n" for u, i in ids.items()))
    with open(folder / "test_list.json", "w") as lines:
        for q in range(5):
            urls = [url(i) for i in (3 * q, 3 * q + 1, 3 * q + 2, (3 * q + 4) % 15)]
            words = make_body(15 * q)["sentence"]
            query = {
                "Content": words,
                "Tag": words[:1],
                "Img_urls": urls,
                "Img_flags": [1, 0, 1, 0],
            }
            lines.write(json.dumps(query) + "\n")


def test_the_client_writes_result_lines_and_map_reads_them(server, tiny_positions, capsys):
    write_meta(tiny_positions / "meta")
    flags = [str(server.port), "--meta", "meta"]
    query_server.main(["dist_sentence_t2i.json", "sentence", *flags])
    query_server.main(["dist_tag_i2t.json", "tag", *flags, "--clients", "1"])
    lines = [json.loads(line) for line in open("dist_sentence_t2i.json")]
    want = scores_of_evaluation("model.pth.tar")
    assert [len(line["urls"]) for line in lines] == [4, 4, 4, 4, 3]  # image 14 has no features
    np.testing.assert_allclose(lines[2]["dist_t2i"], want[[6, 7, 8, 10], 30], atol=2e-6)
    assert "notice: 1 of 20 candidates have no features" in capsys.readouterr().out
    files = ["dist_sentence_t2i.json", "dist_tag_i2t.json"]
    tencent_map.main([*files, "--list", "meta/test_list.json", "--weights", "1", "1.5"])
    out = capsys.readouterr().out.splitlines()
    tags = [json.loads(line) for line in open("dist_tag_i2t.json")]
    scores = [
        [(a + 1.5 * b) / 2.5 for a, b in zip(x["dist_t2i"], y["dist_i2t"], strict=True)]
        for x, y in zip(lines, tags, strict=True)
    ]
    relevant = [[1, 0, 1, 0][: len(x)] for x in scores[:4]] + [[1, 0, 0]]
    metrics = evaluation.average_precision(scores, relevant)
    assert out[0].startswith(f"MAP@1: {metrics['map@1']:.4f}  A@1: {metrics['a@1']:.4f}  (5 quer")
    assert out[1].startswith(f"MAP@2: {metrics['map@2']:.4f}") and out[1].endswith("(4 queries)")
    assert out[2].startswith("MAP@3: nan") and f"{metrics['map']:.4f}" in out[3]


def spoil_line(name, text):
    def spoil(folder):
        lines = (folder / name).read_text().splitlines()
        lines[1] = text
        (folder / name).write_text("\n".join(lines) + "\n")

    return spoil


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_line("test_list.json", "{"), "test_list.json: line 2 is not JSON"),
        (spoil_line("test_list.json", "{}"), "test_list.json: line 2: expected Content and Img"),
        (spoil_line("img_id.txt", "x"), "img_id.txt: line 2: expected a url, a tab and an image"),
        (spoil_line("test_features.json", "[1]"), "test_features.json: line 2: expected .url, vec"),
        (spoil_line("test_own.tsv.0", "1\t2"), "test_own.tsv.0: image 1: expected image_id"),
        (
            lambda f: (f / "test_own.tsv.0").write_bytes(b"1\t\xff\t\xff\t1\t1\t1\n"),
            "test_own.tsv.0: image 1: expected image_id",
        ),
        (lambda f: (f / "img_id.txt").unlink(), "img_id.txt: no such file; --meta is the folder"),
        (
            lambda f: (f / "img_id.txt").write_text("a\t1\n"),
            "meta: none of the 20 candidates has an id in img_id.txt",
        ),
        (
            lambda f: (f / "test_features.json").write_text(
                "".join(f'["/{i}.jpg", [1]]\n' for i in range(15))
            ),
            "test_list.json: line 1: .*422: .*whole_items.0: 1 numbers, expected 12",
        ),
    ],
)
def test_the_client_names_bad_files_and_writes_nothing(server, tiny_positions, spoil, message):
    write_meta(tiny_positions / "meta")
    spoil(tiny_positions / "meta")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        query_server.main(["d.json", "sentence", str(server.port), "--meta", "meta"])
    assert not os.path.exists("d.json") and not os.path.exists("d.json.part")


def test_the_client_waits_for_a_busy_server(tiny_positions):
    server = Server(write_checkpoint(WHOLE), "--max_waiting", "1")
    write_meta(tiny_positions / "meta")
    lines = (tiny_positions / "meta" / "test_list.json").read_text()
    (tiny_positions / "meta" / "test_list.json").write_text(lines * 8)
    query_server.main(["d.json", "tag", str(server.port), "--meta", "meta", "--clients", "6"])
    assert len(Path("d.json").read_text().splitlines()) == 40
    server.process.kill()
    server.process.communicate()


def test_the_client_says_when_no_server_answers(tiny_positions):
    write_meta(tiny_positions / "meta")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    with pytest.raises(ValueError, match="no answer .*is serve.py running"):
        query_server.main(["d.json", "tag", port, "--meta", "meta"])


@pytest.mark.parametrize(
    ("results", "judged", "message"),
    [
        ('{"urls": ["a"], "dist_t2i": []}', "{}", "line 1: expected urls and as many dist_t2i"),
        ('{"urls": [], "dist_t2i": []}\n' * 2, "{}", "1 queries, but 2 were scored"),
        ('{"urls": [], "dist_t2i": []}', '{"Img_urls": ["a"]}', "line 1: expected Img_urls and"),
        ('{"urls": [], "dist_t2i": []}', "[1]", "line 1: expected Img_urls and"),
        ('{"urls": 3, "dist_t2i": [1]}', "{}", "line 1: expected urls and as many dist_t2i"),
        ('{"urls": "a", "dist_t2i": "5"}', "{}", "line 1: expected urls and as many dist_t2i"),
        ('{"urls": [["a"]], "dist_t2i": [5]}', "{}", "line 1: expected urls and as many"),
        ('{"urls": ["a"], "dist_t2i": [null]}', "{}", "line 1: expected numbers in dist_t2i"),
        ("\udcff", "{}", "line 1 is not JSON"),
    ],
)
def test_map_names_bad_lines(tmp_path, monkeypatch, results, judged, message):
    monkeypatch.chdir(tmp_path)
    Path("r.json").write_text(results, errors="surrogateescape")
    Path("list.json").write_text(judged)
    with pytest.raises(ValueError, match=message):
        tencent_map.main(["r.json", "--list", "list.json"])
