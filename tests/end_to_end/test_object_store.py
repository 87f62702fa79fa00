"""Runs whose data and run folder lie in an S3-compatible store, also where it is slow, refuses or goes away."""

from __future__ import annotations

import http.client
import os
import random
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from pyarrow import fs
from small_data import assert_same_result

from pipelines.steps import CleaningRun
from posttrain.errors import DataError, HeldError, PosttrainError
from posttrain.store import lease
from posttrain.store.folder import RunFolder, resolve

pytestmark = pytest.mark.ray

Run = Callable[..., dict[str, Any]]
Undisturbed = Callable[..., dict[str, Any]]

KEY, SECRET = "a-key", "a-s3cret"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Front(ThreadingHTTPServer):
    """Stands before the store and answers for it: slowly, with 503 for a share of the requests, or not at all."""

    daemon_threads = True
    delay_s = 0.0
    refused = 0.0
    """The share of requests that get a 503, as S3 gives them out for SlowDown."""
    gone = False

    def __init__(self, store: int) -> None:
        self.store = store
        self.draw = random.Random(0)
        self.answered = self.turned_away = 0
        super().__init__(("127.0.0.1", 0), _Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def heal(self) -> None:
        self.delay_s, self.refused, self.gone = 0.0, 0.0, False

    def uri(self, path: str) -> str:
        at = f"127.0.0.1%3A{self.server_address[1]}"
        return f"s3://{KEY}:{SECRET}@bucket/{path}?scheme=http&endpoint_override={at}&region=us-east-1"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except ConnectionError:
            self.close_connection = True

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass  # the trailer, such as a checksum
        return body

    def _answer(self) -> None:
        front = self.server
        assert isinstance(front, Front)
        body = self._body()
        time.sleep(front.delay_s)
        if front.gone:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        if front.draw.random() < front.refused:
            front.turned_away += 1
            self.send_response(503, "Slow Down")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        front.answered += 1
        onward = http.client.HTTPConnection("127.0.0.1", front.store, timeout=60)
        headers = {name: value for name, value in self.headers.items() if name.lower() != "transfer-encoding"}
        onward.request(self.command, self.path, body, headers)
        answer = onward.getresponse()
        content = answer.read()
        self.send_response_only(answer.status, answer.reason)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                self.send_header(name, value)
        length = answer.getheader("Content-Length") if self.command == "HEAD" else None
        self.send_header("Content-Length", length or str(len(content)))
        self.end_headers()
        self.wfile.write(content)
        onward.close()

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _answer  # noqa: N815

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the base class writes to standard error."""


@pytest.fixture(scope="module")
def store() -> Iterator[int]:
    """The port of an S3 server (moto's) with one bucket."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                make = urllib.request.Request(f"http://127.0.0.1:{port}/bucket", method="PUT")
                urllib.request.urlopen(make, timeout=5).close()
                break
            except OSError:
                assert time.monotonic() < deadline, "moto's server does not answer"
                time.sleep(0.1)
        yield port
    finally:
        server.kill()
        server.wait()


@pytest.fixture
def front(store: int) -> Iterator[Front]:
    with Front(store) as server:
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def data(store: int, digits_parquet: Path) -> str:
    """The digits in the bucket, beneath this name."""
    with Front(store) as server:
        files, place = resolve(server.uri("digits"))
        for path in sorted(digits_parquet.rglob("*.parquet")):
            to = f"{place}/{path.relative_to(digits_parquet)}"
            fs.copy_files(str(path), to, destination_filesystem=files)
        server.shutdown()
    return "digits"


@pytest.fixture
def in_store(run: Run, front: Front, data: str) -> Run:
    """As `run`, with the data in the bucket, and the run folder in it beneath a name."""

    def clean(name: str, **sections: dict[str, Any]) -> dict[str, Any]:
        splits = {split: front.uri(f"{data}/{split}") for split in ("train", "validation", "test")}
        sections["data"] = {**splits, **sections.get("data", {})}
        # a front has another port in every test, and the folder is to be the same one
        return run(Path("unused"), **{**sections, "run": {"path": front.uri(name)}})

    return clean


def fetched(front: Front, name: str, folder: Path) -> Path:
    """The run folder as a local one."""
    files, place = resolve(front.uri(name))
    for info in files.get_file_info(fs.FileSelector(place, recursive=True)):
        if info.is_file:
            to = folder / os.path.relpath(info.path, place)
            to.parent.mkdir(parents=True, exist_ok=True)
            fs.copy_files(info.path, str(to), source_filesystem=files)
    return folder


def test_a_run_in_a_store_that_is_slow_and_refuses_now_and_then_has_the_result_of_one_on_a_disk(
    in_store: Run, undisturbed: Undisturbed, front: Front, tmp_path: Path
) -> None:
    front.delay_s, front.refused = 0.002, 0.05
    in_store("whole")
    assert front.turned_away > 10
    front.heal()
    local = fetched(front, "whole", tmp_path / "whole")
    assert_same_result(local, undisturbed()["run"])
    assert list(local.rglob("*.tmp")) == []
    # the key and the secret are in no file
    for path in local.rglob("*"):
        assert path.is_dir() or SECRET.encode() not in path.read_bytes(), path
    # again: it is finished, and known as such
    answered = front.answered
    in_store("whole")
    assert front.answered - answered < 200


def test_a_store_that_goes_away_in_a_round_ends_the_run_with_one_error_and_it_goes_on_once_it_is_back(
    in_store: Run, undisturbed: Undisturbed, front: Front, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    select = CleaningRun.select

    def failing(self: CleaningRun, state: Any, scored: Any) -> Any:
        front.gone = state.number == 1
        return select(self, state, scored)

    with monkeypatch.context() as patch:
        patch.setattr(CleaningRun, "select", failing)
        # the command line prints either in one sentence: tests/test_cli.py
        with pytest.raises((PosttrainError, OSError), match=r"gone/rounds/0002/.*") as caught:
            in_store("gone")
    assert SECRET not in str(caught.value)
    front.heal()
    in_store("gone")
    assert_same_result(fetched(front, "gone", tmp_path / "gone"), undisturbed()["run"])


def test_a_bucket_that_is_not_there_is_named_before_any_work(in_store: Run, front: Front) -> None:
    elsewhere = front.uri("digits/train").replace("@bucket/", "@no-such-bucket/")
    with pytest.raises(DataError, match=r"s3://.*@no-such-bucket/digits/train.*: no such file or folder"):
        in_store("refused", data={"train": elsewhere})


def test_a_store_that_does_not_answer_is_named_before_any_work(in_store: Run, front: Front) -> None:
    front.gone = True
    with pytest.raises((PosttrainError, OSError), match=r"refused/run\.yaml.* in bucket 'bucket'") as caught:
        in_store("refused")
    assert SECRET not in str(caught.value)


def test_a_second_run_on_the_folder_is_refused_at_once(in_store: Run, front: Front) -> None:
    with lease.alone(RunFolder(front.uri("held"))), pytest.raises(HeldError, match="another run is at work there"):
        in_store("held")
