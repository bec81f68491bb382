"""What the search of serve.py refuses: bodies, pictures, other sites, too much at once."""

import gc
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="pip install fastapi uvicorn")
pytest.importorskip("PIL", reason="pip install pillow")

import serve_search  # noqa: E402
from serve_search import SearchLimits  # noqa: E402
from tests.searching import make_finder, picture, serving  # noqa: E402


@pytest.fixture
def finder(tiny_positions):
    return make_finder()


@pytest.fixture
def page(finder):
    with serving(finder, hosts=("photos.example.org",)) as page:
        yield page


BAD_UPLOADS = [
    (b"<svg/>", "image/svg+xml", 422),
    (b"", "image/png", 422),
    (b"<html>", "image/png", 422),
    (picture()[:-30], "image/png", 422),
    (picture(), "text/html", 415),
    (picture(), "application/octet-stream", 415),
    (picture(), "multipart/form-data; boundary=x", 415),
    (b"\x89PNG" + bytes(2**20), "image/png", 413),
    (picture(size=(12000, 12000)), "image/png", 422),
]


@pytest.mark.parametrize(("raw", "kind", "status"), BAD_UPLOADS)
def test_a_bad_upload_is_refused_in_one_line(finder, raw, kind, status):
    with serving(finder, SearchLimits(upload_bytes=2**20)) as page:
        reply = page.ask("/api/upload", raw=raw, content_type=kind)
        assert reply.status == status
        assert reply.json.keys() == {"error"} and "\n" not in reply.json["error"]
        assert page.ask("/api/upload", raw=picture(), content_type="image/png").status == 200


BAD_BODIES = [
    (b"", 422, "JSON"),
    (b"[1", 422, "JSON"),
    (b"[]", 422, "object"),
    (b"{}", 422, "query"),
    (b'{"query": 3}', 422, "query"),
    (b'{"query": ""}', 422, "empty sentence"),
    (b'{"query": " \\n "}', 422, "empty sentence"),
    (b'{"query": "\\ud800"}', 422, ""),
    (b'{"query": "a", "paths": 1}', 422, "paths"),
    (b'{"query": "a", "' + b"k" * 50_000 + b'": 1}', 422, "kkk"),
    (b'{"query": "a", "topk": 0}', 422, "topk"),
    (b'{"query": "a", "topk": "3"}', 422, "topk"),
    (b'{"query": "a", "topk": 1e9}', 422, "topk"),
    (b'{"query": "a", "topk": 101}', 422, "topk"),
    (b'{"query": "a", "topk": 20, "shortlist": 10}', 422, "shortlist"),
    (b'{"query": "a", "stages": "third"}', 422, "stages"),
    (b'{"query": "' + b"a " * 400 + b'"}', 422, "words"),
    (b'{"query": "' + b"a" * 2001 + b'"}', 422, "2000"),
    (b'{"query": "a"' + b" " * 2**16 + b"}", 413, "at most 65536"),
]


@pytest.mark.parametrize(("raw", "status", "said"), BAD_BODIES)
def test_a_bad_question_is_refused_in_one_line(page, raw, status, said):
    reply = page.ask("/api/search", raw=raw)
    assert reply.status == status and said in reply.json["error"]
    assert "\n" not in reply.json["error"] and len(reply.json["error"]) < 500


def test_other_questions_that_do_not_fit(page):
    assert page.ask("/api/search", {"query": "a"}, content_type="text/plain").status == 415
    for address in ("", "?image=", "?image=x", "?image=1&image_path=x", "?image=1&topk=1.5"):
        assert page.ask(f"/api/captions{address}").status == 422, address
    for images in ([], ["1"], [0] * 101, 1):
        asked = {"query": "a", "images": images}
        assert page.ask("/api/attention", asked).status == 422, images
    reply = page.ask("/api/search")
    assert reply.status == 405 and reply.json["error"]


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1"},  # another port
        {"origin": "http://localhost:9"},
        {"host": "evil.example"},
        {"host": "evil.example", "origin": "http://evil.example"},
        {"host": "127.0.0.1.evil.example"},
        {"host": "[x"},
        {"sec_fetch_site": "cross-site"},  # an image of another page has no origin
        {"sec_fetch_site": "same-site"},
    ],
    ids=str,
)
def test_other_sites_may_not_ask(page, headers):
    asks = [
        ("/api/search", {"body": {"query": "a"}}),
        ("/api/upload", {"raw": picture(), "content_type": "image/png"}),
        ("/api/captions?image=0", {}),
        ("/photos/0", {}),
        ("/api/info", {}),
    ]
    for path, asked in asks:
        reply = page.ask(path, **asked, **headers)
        assert reply.status == 403 and reply.json.keys() == {"error"}, path


def test_the_servers_own_names_may_ask(page):
    for headers in (
        {"origin": page.address},
        {"origin": page.address, "sec_fetch_site": "same-origin"},
        {"sec_fetch_site": "none"},  # typed by the user
        {"host": "localhost:5091", "origin": "http://localhost:5091"},
        {"host": "[::1]:5091", "origin": "http://[::1]:5091"},
        {"host": "192.168.0.7:80"},
        {"host": "Photos.Example.org"},
        {"origin": "https://photos.example.org"},  # behind a proxy that hides the name
    ):
        assert page.ask("/api/search", {"query": "a"}, **headers).status == 200, headers


def test_too_much_at_once_is_refused_and_late_answers_are_named(finder, monkeypatch):
    started, free = threading.Semaphore(0), threading.Event()

    def slowly(*asked):
        started.release()
        free.wait(300)
        return found

    found = finder.searcher.images_for("a dog")
    monkeypatch.setattr(finder.searcher, "images_for", slowly)
    with serving(finder, SearchLimits(waiting=3, seconds=2.5)) as page:
        with ThreadPoolExecutor(3) as pool:
            asking = [pool.submit(page.ask, "/api/search", {"query": "a"}) for _ in range(3)]
            started.acquire(timeout=20)
            while page.ask("/api/search", {}, content_type="x/y").status != 503:
                time.sleep(0.02)  # until all three have come
            for path in ("/health", "/api/info"):  # other routes are free
                assert page.ask(path).status == 200
            replies = [one.result() for one in asking]
        assert {reply.status for reply in replies} <= {503, 504}
        assert 504 in {reply.status for reply in replies}
        free.set()
        while (reply := page.ask("/api/search", {"query": "a"})).status != 200:
            assert reply.status == 504  # the one that was begun


def test_a_search_is_not_begun_if_its_client_is_gone(finder, monkeypatch, capfd):
    free, begun = threading.Event(), []

    def slowly(query, *more):
        begun.append(query)
        free.wait(300)
        return found

    found = finder.searcher.images_for("a dog")
    monkeypatch.setattr(finder.searcher, "images_for", slowly)
    with serving(finder) as page, ThreadPoolExecutor(1) as pool:
        first = pool.submit(page.ask, "/api/search", {"query": "first"})
        while not begun:
            time.sleep(0.02)
        for _ in range(3):
            body = b'{"query": "gone"}'
            head = (
                f"host: localhost\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
            )
            with socket.create_connection(("127.0.0.1", page.port), timeout=30) as sock:
                sock.sendall(f"POST /api/search HTTP/1.1\r\n{head}\r\n\r\n".encode() + body)
                time.sleep(0.3)
        time.sleep(0.5)
        free.set()
        assert first.result().status == 200
        assert page.ask("/api/search", {"query": "last"}).status == 200
    assert begun == ["first", "last"]
    assert "Traceback" not in capfd.readouterr().err


def test_pictures_of_clients_that_are_gone_are_not_kept(finder, monkeypatch, capfd):
    """One is read; behind it no picture waits whose client has gone."""
    free, begun = threading.Event(), []

    def slowly(data):
        begun.append(len(data))
        free.wait(300)
        return np.zeros((8, 8, 3), np.uint8)

    monkeypatch.setattr(finder.pictures, "read", slowly)
    monkeypatch.setattr(serve_search, "bytes", Body, raising=False)  # of what it gives to a call
    with serving(finder) as page:
        for number in range(12):
            raw = b"x" * (1000 + number)
            head = f"host: localhost\r\ncontent-type: image/png\r\ncontent-length: {len(raw)}"
            with socket.create_connection(("127.0.0.1", page.port), timeout=30) as sock:
                sock.sendall(f"POST /api/upload HTTP/1.1\r\n{head}\r\n\r\n".encode() + raw)
                while not begun:
                    time.sleep(0.02)
                time.sleep(0.05)
        end = time.monotonic() + 20
        while (kept := kept_bodies()) != {1000} and time.monotonic() < end:
            time.sleep(0.05)
        assert kept == {1000}  # the one that is being read
        free.set()
        assert page.ask("/api/upload", raw=picture(), content_type="image/png").status == 200
    assert begun[0] == 1000 and len(begun) == 2
    assert "Traceback" not in capfd.readouterr().err


class Body(bytes):
    """A body that gc.get_objects finds; it finds no bytes, and not always the tuple around them."""


def kept_bodies() -> set[int]:
    """The sizes of the bodies that calls have as an argument."""
    return {len(x) for x in gc.get_objects() if type(x) is Body}


def test_host_names_are_read_as_browsers_read_them():
    assert serve_search.host_name("[::1]:80") == "::1"
    assert serve_search.host_name("A.example:80") == "a.example"
    assert serve_search.host_name("a@b:80") == "b"
    assert serve_search.host_name("[bad") == ""
