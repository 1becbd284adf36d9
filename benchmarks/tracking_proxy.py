"""A server before the tracking server: one that wants a login, answers late, or never answers."""

import base64
import http.client
import threading
from collections.abc import Collection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple, Self
from urllib.parse import urlsplit

_HOP_BY_HOP = ("connection", "transfer-encoding", "content-length", "host", "date", "server")


def basic(user: str, password: str) -> str:
    """The header's value for a user and a password."""
    return f"Basic {base64.b64encode(f'{user}:{password}'.encode()).decode()}"


def bearer(token: str) -> str:
    return f"Bearer {token}"


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes


class Proxy:
    """Passes requests on to `upstream`. Used as a context; its values may be changed meanwhile.

    Args:
        upstream: a server's address; empty: nobody is behind it, and requests get no answer.
        accepted: values of the Authorization header that are let through; None: any, and none at all.
        refusal: the status and the text of its answer to others.
        delay_s: how long it waits before it passes a request on.
    """

    def __init__(
        self,
        upstream: str,
        *,
        accepted: Collection[str] | None = None,
        refusal: tuple[int, str] = (401, "You are not authenticated."),
        delay_s: float = 0.0,
    ) -> None:
        self.upstream, self.accepted, self.refusal, self.delay_s = upstream, accepted, refusal, delay_s
        self.passed: list[str] = []  # method and path of what was let through
        self.refused = 0
        self._over = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    @property
    def place(self) -> str:
        """Host and port."""
        return f"127.0.0.1:{self._server.server_port}"

    @property
    def url(self) -> str:
        return f"http://{self.place}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def answer(self, method: str, path: str, headers: dict[str, str], body: bytes) -> Answer | None:
        """What the server behind answers; None: nothing comes."""
        self._over.wait(self.delay_s if self.upstream else None)
        if self._over.is_set():
            return None
        connection = http.client.HTTPConnection(urlsplit(self.upstream).netloc, timeout=60)
        try:
            connection.request(method, path, body, headers)
            found = connection.getresponse()
            kept = {name: value for name, value in found.getheaders() if name.lower() not in _HOP_BY_HOP}
            return Answer(found.status, kept, found.read())
        finally:
            connection.close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one_request(self) -> None:
                try:
                    super().handle_one_request()
                except OSError:  # the client had no patience
                    self.close_connection = True

            def do_GET(self) -> None:
                body = self._body()
                if proxy.accepted is not None and self.headers.get("Authorization") not in proxy.accepted:
                    proxy.refused += 1
                    status, text = proxy.refusal
                    self._send(status, {"Content-Type": "text/plain"}, text.encode())
                    return
                proxy.passed.append(f"{self.command} {self.path}")
                own = {name: value for name, value in self.headers.items() if name.lower() not in _HOP_BY_HOP}
                own.pop("Authorization", None)
                try:
                    found = proxy.answer(self.command, self.path, own, body)
                except OSError as error:  # nobody listens there
                    self._send(502, {}, str(error).encode())
                    return
                if found is None:
                    self.close_connection = True
                    return
                self._send(*found)

            do_POST = do_PUT = do_PATCH = do_DELETE = do_GET

            def _body(self) -> bytes:
                if self.headers.get("Transfer-Encoding") == "chunked":
                    parts = []
                    while length := int(self.rfile.readline(), 16):
                        parts.append(self.rfile.read(length))
                        self.rfile.readline()
                    self.rfile.readline()
                    return b"".join(parts)
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))

            def _send(self, status: int, headers: dict[str, str], body: bytes) -> None:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                pass

        return Handler
