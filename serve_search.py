"""The search of serve.py: a page, and the routes that it asks.

    python serve.py runs/x/model_best.pth.tar --data_path data --data_name demo_precomp --split test

    GET  /                        the page (util/search_page)
    GET  /api/info                what there is to search, and within which limits
    POST /api/search              {"query": sentence} -> images, best first
    GET  /api/captions?image=3    captions of the data set for one of its images, best first
    POST /api/attention           {"query": sentence, "images": [3]} -> weights of words and regions
    POST /api/upload              the bytes of a picture -> captions, best first
    GET  /photos/3                the photo of an image, as a JPEG of at most 1,000 pixels a side

serve_finder.py computes the answers. Here is who may ask, how much, and how long it may take. One
thread does all work of the model, that of serve.py included.
"""

import asyncio
import base64
import functools
import hashlib
import html
import ipaddress
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from serve_finder import Finder, NoSuchImage
from serve_schema import AttentionOf, CaptionSearch, ImageSearch, Ranking, explain
from util.cli import InputError
from util.request_batcher import Refused, RequestBatcher
from util.uploads import Unavailable

PAGE = Path(__file__).parent / "util" / "search_page"
HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",  # another data set may be served at the same address tomorrow
}
UNREAD = (403, 408, 413, 415, 503)  # statuses of requests whose body may not have been read
RESPONSES = {
    403: {"description": "from a page of another site"},
    404: {"description": "no such image, or no uploads"},
    413: {"description": "the body is too large"},
    415: {"description": "another content-type is expected"},
    422: {"description": "the request does not fit, or the picture cannot be read"},
    503: {"description": "too many requests at once"},
    504: {"description": "no answer in time"},
}


class SearchLimits(NamedTuple):
    """The limits of one request, and of all requests together."""

    body_bytes: int = 64 * 2**10
    upload_bytes: int = 10 * 2**20
    waiting: int = 32  # requests in progress at a time
    seconds: float = 30.0  # to send a body, and again for the reply


# Over HTTP


def asked_for(schema: type[BaseModel], request: Request, raw: bytes | None = None) -> BaseModel:
    """What a request asks for, in its body or else in its address. Raises Refused."""
    try:
        if raw is not None:
            return schema.model_validate_json(raw)
        return schema.model_validate_strings(dict(request.query_params))
    except ValidationError as error:
        raise Refused(422, explain(error)) from None


def host_name(netloc: str) -> str:
    """The name in HOST:PORT; empty if it is none."""
    try:
        return (urlsplit(f"//{netloc}").hostname or "").lower()
    except ValueError:
        return ""


def is_address(name: str) -> bool:
    try:
        return bool(ipaddress.ip_address(name))
    except ValueError:
        return False


class SearchRoutes:
    """The routes: who may ask, how much, and how long it may take."""

    def __init__(
        self,
        finder: Finder,
        batcher: RequestBatcher,
        limits: SearchLimits,
        names: tuple[str, ...] = (),
    ):
        self.finder, self.batcher, self.limits = finder, batcher, limits
        self.names = {"localhost", *(name.lower() for name in names)}
        self.in_flight: Counter[str] = Counter()  # of each route: a slow one blocks no other
        self.photo_readers = ThreadPoolExecutor(2, "photos")
        self.upload_reader = ThreadPoolExecutor(1, "uploads")
        self.turns: dict[ThreadPoolExecutor, asyncio.Semaphore] = {
            self.photo_readers: asyncio.Semaphore(2),
            self.upload_reader: asyncio.Semaphore(1),
            batcher.worker: asyncio.Semaphore(1),
        }
        self.unread: set[str] = set()  # photos of which it was said that they cannot be read

    def close(self) -> None:
        self.finder.close()
        self.photo_readers.shutdown()
        self.upload_reader.shutdown()

    def add(self, app: FastAPI) -> None:
        """Add the page and its routes to the application."""
        add_pages(app, build_page("page"))
        ask, tell = app.post, app.get
        for method, path, handler, schema in (
            (tell, "/api/info", self.info, None),
            (ask, "/api/search", self.search, ImageSearch),
            (tell, "/api/captions", self.captions, None),
            (ask, "/api/attention", self.attention, AttentionOf),
            (ask, "/api/upload", self.upload, None),
            (tell, "/photos/{number}", self.photo, None),
        ):
            more = {}
            if schema is not None:
                content = {"application/json": {"schema": schema.model_json_schema()}}
                more = {"openapi_extra": {"requestBody": {"content": content, "required": True}}}
            method(path, responses=RESPONSES, **more)(self.guarded(handler))

    def guarded(self, handler: Callable) -> Callable:
        """A route: what the handler gives, or {"error": one line} with a status."""

        @functools.wraps(handler)
        async def route(request: Request):
            try:
                self.check_sender(request)
                waiting = self.in_flight[handler.__name__]
                if waiting >= self.limits.waiting:
                    raise Refused(503, f"{waiting} requests are waiting already; try again")
                self.in_flight[handler.__name__] += 1
                try:
                    answer = await handler(request)
                finally:
                    self.in_flight[handler.__name__] -= 1
                if not isinstance(answer, Response):
                    answer = JSONResponse(answer, 200, HEADERS)
                return answer
            except Refused as refused:
                status, said = refused.status, str(refused)
            except Unavailable as error:
                status, said = 503, str(error)
            except NoSuchImage as error:
                status, said = 404, str(error)
            except InputError as error:
                status, said = 422, str(error)
            except ClientDisconnect:
                status, said = 499, "the client is gone"
            headers = HEADERS
            if status in UNREAD:
                if "expect" not in request.headers:
                    await self.batcher.drain(request)
                # Else the unread rest of a body would be taken for the next request.
                headers = HEADERS | {"connection": "close"}
            return JSONResponse({"error": said}, status, headers)

        return route

    def check_sender(self, request: Request) -> None:
        """Refuse what another site's page sends, also one that has taken this address for its name.

        A name that is no address must be one that this server was told; an `Origin`, which browsers
        send, must be this server. An <img> of another page has none, but browsers say in
        `Sec-Fetch-Site` where it stands.
        """
        host = request.headers.get("host", "").lower()
        name = host_name(host)
        if not (is_address(name) or name in self.names):
            raise Refused(403, f"not a name of this server: {name[:80]!r}; see --public_host")
        origin = request.headers.get("origin")
        if request.headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
            raise Refused(403, "a request from a page of another site")
        if origin is None:
            return
        of_page = origin.lower().partition("://")[2]
        ours = {name for name in self.names - {"localhost"} if not is_address(name)}
        if of_page != host and host_name(of_page) not in ours:
            raise Refused(403, f"a request from a page of another site: {origin[:80]!r}")

    async def read_body(self, request: Request, kind: str, limit: int) -> bytes:
        """The body of a request of some content-type, e.g. image/*. Raises Refused."""
        found = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if not fnmatch(found, kind):
            raise Refused(415, f"content-type {found[:40]!r}: expected {kind}")
        told = request.headers.get("content-length", "0")
        if told.isdecimal() and int(told[:20]) > limit:
            raise Refused(413, f"a body of {told[:20]} bytes, expected at most {limit}")
        raw = bytearray()
        try:
            async with asyncio.timeout(self.limits.seconds):
                async for chunk in request.stream():
                    raw += chunk
                    if len(raw) > limit:
                        raise Refused(413, f"a body of over {limit} bytes")
        except TimeoutError:
            raise Refused(408, f"no whole body in {self.limits.seconds:g} s") from None
        return bytes(raw)

    async def in_thread(self, pool: ThreadPoolExecutor, request: Request, work: Callable, *args):
        """What a function gives in a thread of a pool. Raises Refused if it takes too long.

        If its turn has not come when the time is over or the client is gone, it is not called.
        """
        job = asyncio.ensure_future(self.in_turn(pool, work, *args))
        gone = asyncio.ensure_future(self.batcher.disconnected(request))
        try:
            async with asyncio.timeout(self.limits.seconds):
                await asyncio.wait((job, gone), return_when=asyncio.FIRST_COMPLETED)
            if not job.done():
                raise ClientDisconnect
            return job.result()
        except TimeoutError:
            raise Refused(504, f"no answer in {self.limits.seconds:g} s; try again") from None
        finally:
            gone.cancel()
            job.cancel()

    async def in_turn(self, pool: ThreadPoolExecutor, work: Callable, *args):
        """What a function gives in a thread of a pool.

        No more calls are given to the pool than it has threads: the pool would keep the arguments
        of calls that nobody waits for any more, such as uploads.
        """
        loop, turn = asyncio.get_running_loop(), self.turns[pool]

        def ended(_) -> None:
            with suppress(RuntimeError):  # the server has stopped
                loop.call_soon_threadsafe(turn.release)

        await turn.acquire()
        job = pool.submit(work, *args)
        job.add_done_callback(ended)  # also if nobody waits for it any more
        return await asyncio.wrap_future(job)

    async def with_model(self, request: Request, work: Callable, *args) -> dict:
        """What a function gives that uses the model: it waits for its turn."""
        return await self.in_thread(self.batcher.worker, request, work, *args)

    # The handlers

    async def info(self, request: Request) -> dict:
        """What there is to search, and within which limits."""
        return self.finder.info | {"upload_bytes": self.limits.upload_bytes}

    async def search(self, request: Request) -> dict:
        """Rank images for a sentence."""
        raw = await self.read_body(request, "application/json", self.limits.body_bytes)
        asked = asked_for(ImageSearch, request, raw)
        return await self.with_model(request, self.finder.find_images, asked)

    async def captions(self, request: Request) -> dict:
        """Rank captions for an image of the data set: ?image=3, and optionally how to rank."""
        asked = asked_for(CaptionSearch, request)
        return await self.with_model(request, self.finder.find_captions, asked)

    async def attention(self, request: Request) -> dict:
        """Tell which regions of images the words of a sentence attend to."""
        raw = await self.read_body(request, "application/json", self.limits.body_bytes)
        asked = asked_for(AttentionOf, request, raw)
        return await self.with_model(request, self.finder.look, asked)

    async def upload(self, request: Request) -> dict:
        """Rank captions for a picture, the body: image/jpeg or alike."""
        if self.finder.no_uploads:
            raise Refused(404, self.finder.no_uploads)
        asked = asked_for(Ranking, request)
        raw = await self.read_body(request, "image/*", self.limits.upload_bytes)
        read = self.finder.pictures.read
        pixels = await self.in_thread(self.upload_reader, request, read, raw)
        return await self.with_model(request, self.finder.captions_of_picture, pixels, asked)

    async def photo(self, request: Request) -> Response:
        """The photo of an image of the data set, as a JPEG."""
        text, photos = request.path_params["number"], self.finder.photos
        known = text.isascii() and text.isdecimal() and len(text) < 12 and int(text) < len(photos)
        if not known or photos[int(text)] is None:
            raise Refused(404, f"no photo of image {text[:12]!r}")
        try:
            data = await self.in_thread(self.photo_readers, request, self.finder.photo, int(text))
        except (InputError, OSError) as error:
            if text not in self.unread:  # not to the client: it names a folder here
                print(f"warning: {error}", flush=True)
                self.unread.add(text)
            raise Refused(404, f"the photo of image {text} cannot be read") from None
        return Response(data, 200, HEADERS, "image/jpeg")


# The page


def build_page(name: str, **texts: str) -> HTMLResponse:
    """A page of util/search_page as one file, which its headers forbid to load anything else.

    In it `{{name}}` stands for a text, which is escaped.
    """
    style, script = (PAGE / "page.css").read_text(), ""
    body = (PAGE / f"{name}.html").read_text(encoding="utf-8")
    for key, text in texts.items():
        body = body.replace("{{" + key + "}}", html.escape(text))
    if "{{script}}" in body:
        script = (PAGE / f"{name}.js").read_text(encoding="utf-8")
    body = body.replace("{{style}}", style).replace("{{script}}", script)

    def hashed(text: str) -> str:
        return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()

    policy = (
        "default-src 'none'; connect-src 'self'; img-src 'self' blob:; base-uri 'none'; "
        f"form-action 'self'; frame-ancestors 'none'; style-src 'sha256-{hashed(style)}'; "
        f"script-src 'sha256-{hashed(script)}'"
    )
    return HTMLResponse(body, 200, HEADERS | {"content-security-policy": policy})


def add_pages(app: FastAPI, page: HTMLResponse) -> None:
    """Add the page at /, its icon, and one-line errors where there is no route."""

    @app.get("/", include_in_schema=False)
    async def show_page():
        return page

    @app.get("/icon.svg", include_in_schema=False)
    async def show_icon():
        return Response((PAGE / "icon.svg").read_bytes(), 200, HEADERS, "image/svg+xml")

    @app.exception_handler(HTTPException)
    async def say(request: Request, error: HTTPException):
        return JSONResponse({"error": error.detail}, error.status_code, error.headers)


def add_start(app: FastAPI, checkpoint: str, data_name: str) -> None:
    """Add a page that says how to start the server with data to search."""
    add_pages(app, build_page("start", checkpoint=checkpoint, data_name=data_name))
