"""What the tests of the search page share: a data set with photos, and a server in a thread."""

import contextlib
import io
import json
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

pytest.importorskip("fastapi", reason="pip install fastapi uvicorn")
Image = pytest.importorskip("PIL.Image", reason="pip install pillow")

import uvicorn  # noqa: E402

import serve  # noqa: E402
from searcher import Searcher  # noqa: E402
from serve_finder import Finder  # noqa: E402
from serve_search import SearchLimits  # noqa: E402
from tests.serving import write_checkpoint  # noqa: E402
from util.photos import find_photos  # noqa: E402
from util.region_backends import Regions  # noqa: E402
from util.uploads import PictureReader  # noqa: E402

SCAN = {"model": "scan", "cross_attn": "t2i"}
HOSTILE = '<script>window.pwned = 1</script><img src="x" onerror="window.pwned = 1"> red cat & dog'
BARE = 14  # the image without a photo


def picture(colour=(200, 30, 30), size=(40, 30), kind="PNG", **more) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, kind, **more)
    return file.getvalue()


class StandIn:
    """An extractor whose regions tell the mean colour of a picture."""

    def extract(self, pictures: list) -> list[Regions]:
        found = []
        for picture in pictures:
            colour = np.asarray(picture, np.float32).mean((0, 1)) / 255  # (3,)
            features = np.tile(colour, (4, 4)) + np.arange(4)[:, None]  # (R, F)
            boxes = np.tile(np.float32([0, 0, *picture.size]), (4, 1))  # (R, 4)
            whole = features.mean(0).astype(np.float32)
            found.append(Regions(features.astype(np.float32), boxes, picture.size, whole))
        return found


def write_photos(folder: Path = Path("photos")) -> None:
    """Photos p0.jpg, ... of the tiny test split, of the sizes that it tells, but for one image."""
    folder.mkdir()
    stem = "data/tiny_precomp/test"
    sizes = np.load(f"{stem}_ims_size.npy")
    for number, (width, height) in enumerate(sizes.tolist()):
        if number != BARE:
            colour = number * 16, 120, 255 - number * 16
            Image.new("RGB", (width, height), colour).save(folder / f"p{number}.jpg")
    Path(f"{stem}_ids.txt").write_text("".join(f"p{k}.jpg\n" for k in range(len(sizes))))


def write_hostile_captions() -> None:
    """Let the first captions of the tiny test split hold HTML."""
    path = Path("data/tiny_precomp/test_caps.txt")
    lines = path.read_text().splitlines()
    path.write_text("".join(f"{line}\n" for line in [HOSTILE] * 5 + lines[5:]))


def make_finder(system: dict = SCAN, uploads: bool = True, photos=None, **more) -> Finder:
    """A Finder of the tiny test split with random weights; photos: a folder."""
    path = write_checkpoint(system)
    searcher = Searcher(path, "data", "tiny_precomp", "test", device="cpu", **more)
    paths = find_photos(photos, searcher.folder, "test", searcher.ids, searcher.n_images)
    parts = (StandIn(), PictureReader()) if uploads else ()
    return Finder(searcher, paths, *parts)


class Reply(NamedTuple):
    status: int
    headers: dict[str, str]  # names in lower case
    body: bytes

    @property
    def json(self):
        return json.loads(self.body)


class Page:
    """The address of a running server."""

    def __init__(self, port: int):
        self.port, self.address = port, f"http://127.0.0.1:{port}"

    def ask(self, path: str, body=None, raw: bytes | None = None, **headers) -> Reply:
        """The reply to a POST of a body, or to a GET if there is none."""
        data = raw if raw is not None else (None if body is None else json.dumps(body).encode())
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        headers = {"content-type": "application/json"} | headers
        request = urllib.request.Request(f"{self.address}{path}", data, headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                found = reply.status, reply.headers, reply.read()
        except urllib.error.HTTPError as error:
            found = error.code, error.headers, error.read()
        return Reply(found[0], {k.lower(): v for k, v in found[1].items()}, found[2])


@contextlib.contextmanager
def serving(finder: Finder | None, limits: SearchLimits | None = None, hosts=(), path=None):
    """A server in a thread of this process; without a finder it serves scores only."""
    loaded = None
    if finder is not None:
        loaded = finder.searcher.model, finder.searcher.vocab, finder.searcher.opt
    scorer = serve.Scorer(path, None, torch.device("cpu"), serve.Limits(), loaded)
    app = serve.build_app(scorer, path or "model.pth.tar", finder, limits, hosts)
    config = uvicorn.Config(app, log_level="error", access_log=False, timeout_graceful_shutdown=5)
    server, sock = uvicorn.Server(config), serve.open_socket("127.0.0.1", 0, 64)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
    thread.start()
    try:
        yield Page(sock.getsockname()[1])
    finally:
        server.should_exit = True
        thread.join()
