"""Real servers on loopback, and what stands before one and does to its requests what a test says."""

from __future__ import annotations

import http.client
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on; the system gives none of those that Ray's workers take."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


class Server:
    """`python -m` a module that serves HTTP on loopback, with its log in the folder; can be killed and started again.

    `options` follow --host and --port; it is up once it answers a GET of `path`.
    """

    def __init__(self, folder: Path, module: str, *options: str, path: str) -> None:
        [self.port] = free_ports(1)
        self.uri = f"http://127.0.0.1:{self.port}"
        self._folder, self._path = folder, path
        self._command = [sys.executable, "-m", *module.split(), "--host", "127.0.0.1", "--port", str(self.port)]
        self._command += options
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        log = self._folder / "log"
        with log.open("a") as stream:
            self._process = subprocess.Popen(self._command, stdout=stream, stderr=stream, cwd=self._folder)
        deadline = time.monotonic() + 200
        while True:
            try:
                _direct.open(f"{self.uri}{self._path}", timeout=2).close()
                return
            except OSError:
                assert self._process.poll() is None and time.monotonic() < deadline, log.read_text()[-2000:]
                time.sleep(0.2)

    def kill(self) -> None:
        """Also its children."""
        if self._process is not None:
            for child in Path(f"/proc/{self._process.pid}/task").glob("*/children"):
                for pid in child.read_text().split():
                    subprocess.run(["kill", "-9", pid], check=False)
            self._process.kill()
            self._process.wait()
            self._process = None


@contextmanager
def serving(server: Server) -> Iterator[Server]:
    """The server while it is up."""
    try:
        server.start()
        yield server
    finally:
        server.kill()


def mlflow_server(folder: Path) -> Server:
    """A real MLflow server, with what it keeps in the folder."""
    store = ("--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", str(folder / "files"))
    return Server(folder, "mlflow server", "--workers", "1", *store, path="/health")


class Between(ThreadingHTTPServer):
    """Stands before the server at a port, and does to requests what `mood` says."""

    daemon_threads = True

    def __init__(self, port: int) -> None:
        self.behind = port
        self.mood: Callable[[str, str], str] = _let_pass
        """Of a request's method and path: pass, lose the answer (lose), never answer (hang), end the connection before
        anything is done (gone), or a status such as 503."""
        self.moods: list[str] = []
        """What was done to the requests so far."""
        self.ended = threading.Event()
        super().__init__(("127.0.0.1", 0), _Handler)
        self.uri = f"http://127.0.0.1:{self.server_port}"

    def heal(self) -> None:
        """Let everything pass."""
        self.mood = _let_pass

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that gave up


@contextmanager
def standing_before(port: int) -> Iterator[Between]:
    """A `Between` that is at work while the context lasts."""
    with Between(port) as between:
        thread = threading.Thread(target=between.serve_forever)
        thread.start()
        try:
            yield between
        finally:
            between.ended.set()
            between.shutdown()
            thread.join()


def _let_pass(method: str, path: str) -> str:
    return "pass"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass  # the trailer, such as a checksum
        return body

    def _answer(self) -> None:
        between = self.server
        assert isinstance(between, Between)
        body = self._body()
        mood = between.mood(self.command, self.path)
        between.moods.append(mood)
        if mood in ("hang", "gone", "lose"):
            self.close_connection = True
        if mood == "hang":
            between.ended.wait(60)
        elif mood.isdigit():
            self.send_error(int(mood))
        elif mood in ("pass", "lose"):
            self._pass_on(between.behind, body, lose=mood == "lose")

    def _pass_on(self, port: int, body: bytes, *, lose: bool) -> None:
        # those of this connection; http.client gives the next one its own
        own = ("host", "connection", "transfer-encoding", "expect")
        headers = {name: value for name, value in self.headers.items() if name.lower() not in own}
        onward = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        try:
            onward.request(self.command, self.path, body or None, headers)
            answer = onward.getresponse()
            content = answer.read()
        finally:
            onward.close()
        if lose:
            return
        self.send_response_only(answer.status, answer.reason)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                self.send_header(name, value)
        length = answer.getheader("Content-Length") if self.command == "HEAD" else None
        self.send_header("Content-Length", length or str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do_HEAD = _answer  # noqa: N815

    def log_message(self, format: str, *args: Any) -> None:
        pass
