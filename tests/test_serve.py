"""The server: it computes the scores of evaluation, and refuses bad requests."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from scripts import load_server
from util import positions

pytest.importorskip("fastapi", reason="pip install fastapi uvicorn")

import serve  # noqa: E402
from tests.serving import (  # noqa: E402
    GSMN,
    ROOT,
    WHOLE,
    Server,
    b64,
    make_body,
    make_scorer,
    raw_request,
    scores_of_evaluation,
    write_checkpoint,
)

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


def memory_mib(pid: int) -> float:
    if not os.path.exists(f"/proc/{pid}/status"):
        return 0.0  # not measured outside Linux
    return load_server.memory_mib(pid)


def spoiled(change) -> bytes:
    body = make_body(images=range(3))
    change(body)
    return json.dumps(body).encode()


def on_record(**fields):
    return lambda body: body["boxes"][1].update(fields)


HOSTILE = {  # name: (the body, or a change to a good body; a part of the answer)
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


def test_hostile_bodies_are_answered_and_survived(tiny_positions, request):
    server = Server(write_checkpoint(WHOLE))  # its process id is that of serve.py
    request.addfinalizer(server.process.kill)
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
    # Nothing hangs, and no size in a body is allocated: some of them would take gigabytes.
    assert slowest < 60 and memory_mib(server.process.pid) < before + 1000
    unknown = make_body() | {"id": 3, "path": "/etc/passwd"}  # other fields are not read
    unknown["boxes"][0]["attributes"] = [1, 2]
    status, again = server.ask(unknown)
    assert status == 200 and again == want
    status, health = server.ask(path="/health")
    assert status == 200 and (health["status"], health["answered"]) == ("ok", 2)
    code, out = server.stop()
    assert code == 0 and "Traceback" not in out and out.endswith("stopped\n")


def test_the_size_that_a_request_declares_or_has_is_bounded(server):
    json_head = "host: x\r\ncontent-type: application/json"
    start = time.monotonic()
    got = raw_request(server, f"{json_head}\r\ncontent-length: {2**30}")
    assert b" 413 " in got and b"a body of 1073741824 bytes, expected at most 67108864" in got
    got = raw_request(server, f"{json_head}\r\ncontent-length: {'9' * 30}")
    assert b" 413 " in got or b" 400 " in got
    assert time.monotonic() - start < 60  # it does not wait for the body
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
        except OSError:  # the server may close the connection
            pass
        got = sock.recv(4096)
    assert b" 413 " in got
    assert server.ask(make_body())[0] == 200


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


def test_a_sparse_gsmn_says_what_it_needs(tiny_positions):
    scorer = make_scorer(write_checkpoint(GSMN | {"is_sparse": True}))
    for more in ({}, {"dependencies": [[0, 99]]}, {"dependencies": [[-1, 2]]}):
        with pytest.raises(serve.Refused, match="dependencies: this model needs them"):
            scorer.read(json.dumps(make_body(**more)).encode())


def test_what_cannot_be_served_is_one_line(tiny_positions, warm):
    def run(*args, **env):
        done = subprocess.run(
            [sys.executable if env else warm, ROOT / "serve.py", *args],
            capture_output=True,
            text=True,
            timeout=60,  # it may serve although it should refuse
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
