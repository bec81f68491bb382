"""Who may ask serve.py: requests that a page of another site sends are refused."""

import ipaddress
from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse

from util.request_bodies import Refused


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


class Senders:
    """The names of this server, and what they say about a request."""

    def __init__(self, names: Iterable[str] = ()):
        self.names = {"localhost", *(name.lower() for name in names)}

    def check_host(self, headers: Headers) -> None:
        """Refuse a name that another site's page may have taken for this address (DNS rebinding).

        Such a name has a dot. What is no address must be a name that this server was told, or one
        without a dot, as of a machine beside this one. Raises Refused.
        """
        name = host_name(headers.get("host", ""))
        if not name or ("." in name and not is_address(name) and name not in self.names):
            raise Refused(403, f"not a name of this server: {name[:80]!r}; see --public_host")

    def check(self, headers: Headers) -> None:
        """Refuse what a page of another site sends. Raises Refused.

        An `Origin`, which browsers send, must be this server. An <img> of another page has none,
        but browsers say in `Sec-Fetch-Site` where it stands.
        """
        self.check_host(headers)
        origin = headers.get("origin")
        if headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
            raise Refused(403, "a request from a page of another site")
        if origin is None:
            return
        of_page = origin.lower().partition("://")[2]
        ours = {name for name in self.names - {"localhost"} if not is_address(name)}
        if of_page != headers.get("host", "").lower() and host_name(of_page) not in ours:
            raise Refused(403, f"a request from a page of another site: {origin[:80]!r}")


class OwnNamesOnly:
    """Around an application that listens on this machine only: it checks the host of a request."""

    def __init__(self, app, senders: Senders):
        self.app, self.senders = app, senders

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "http":
            try:
                self.senders.check_host(Headers(scope=scope))
            except Refused as refused:
                headers = {"connection": "close"}  # its body is not read
                answer = JSONResponse({"error": str(refused)}, refused.status, headers)
                return await answer(scope, receive, send)
        await self.app(scope, receive, send)
