"""What the tests of the server share: checkpoints, requests, and a server process."""

import argparse
import base64
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch

import checkpoint as ckpt
import evaluation
import options
import systems
from vocab import deserialize_vocab

pytest.importorskip("fastapi", reason="pip install fastapi uvicorn")

import uvicorn  # noqa: E402

import serve  # noqa: E402
from util.connections import ConnectionLimits, configure  # noqa: E402

ROOT = Path(__file__).parent.parent
SIZES = {
    "img_dim": 12,
    "embed_size": 16,
    "word_dim": 8,
    "bi_gru": True,
    "data_name": "tiny_precomp",
}
GSMN = {"model": "gsmn", "num_block": 4, "feat_dim": 4, "hid_dim": 16}
WHOLE = {"model": "pfan_whole", "lambda_whole": 2.0}


def write_checkpoint(system: dict, path: str = "model.pth.tar") -> str:
    """Write a checkpoint of a model with random weights, and return its path."""
    opt = argparse.Namespace(**options.defaults(system["model"]) | SIZES | system)
    words = systems.of(opt).vocabulary(deserialize_vocab("vocab/tiny_precomp_vocab.json"), opt)
    torch.manual_seed(0)
    net = ckpt.build_model(opt, len(words))
    state = {"epoch": 0, "model": ckpt.state_dicts(net, opt), "opt": opt}
    torch.save(state | {"best_rsum": 0.0, "Eiters": 0, "vocab": words.state_dict()}, path)
    return path


def b64(array) -> str:
    return base64.b64encode(np.ascontiguousarray(array, "<f4").tobytes()).decode()


def make_body(caption: int = 0, images=range(15), **more) -> dict:
    """The body of a request: a caption of the tiny test split and some of its images."""
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
    data = systems.open_split("data/tiny_precomp", "test", words, state["opt"])
    return evaluation.score_matrix(net, *evaluation.encode_data(net, data))


def make_scorer(path: str) -> serve.Scorer:
    return serve.Scorer(path, None, torch.device("cpu"), serve.Limits())


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
        """(status, answer) of a POST, or of a GET if there is no body."""
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
        out = self.process.communicate(timeout=300)[0]
        return self.process.returncode, out


def raw_request(server, head: str, body: bytes = b"") -> bytes:
    """The reply to a request written by hand, up to the end of the connection."""
    sock = server.send(
        f"POST /scan_sentence_image_score HTTP/1.1\r\n{head}\r\n\r\n".encode() + body
    )
    with sock, sock.makefile("rb") as reply:
        return reply.read()


@contextlib.contextmanager
def in_thread(limits: serve.Limits, connections: ConnectionLimits, finder=None, **more):
    """The port of a server in a thread, and its scorer, with limits of a test's own."""
    loaded = None
    if finder is not None:
        loaded = finder.searcher.model, finder.searcher.vocab, finder.searcher.opt
    path = None if loaded else write_checkpoint(WHOLE)
    scorer = serve.Scorer(path, None, torch.device("cpu"), limits, loaded)
    app = serve.build_app(scorer, "model.pth.tar", finder, own_machine=True, **more)
    server = uvicorn.Server(configure(app, 1, connections))
    sock = serve.open_socket("127.0.0.1", 0, 64)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
    thread.start()
    try:
        yield sock.getsockname()[1], scorer
    finally:
        server.should_exit = True
        thread.join()
