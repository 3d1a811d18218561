"""An HTTP server on loopback for the files of a folder; it counts requests and fails on demand."""

import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What becomes of one request."""

    status: int = 200
    flipped_byte: int | None = None
    cut_at: int | None = None
    """Bytes after which the connection is closed, too early."""
    is_short: bool = False
    """`cut_at` with a content length that fits, as a server gives that holds a shorter file."""
    pause_seconds: float = 0.0
    """Between the two halves of the answer."""


class FileServer(ThreadingHTTPServer):
    """Serves `folder`; knows no byte ranges, as the simplest servers."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.num_requests: Counter[str] = Counter()
        self.faults: defaultdict[str, deque[Fault]] = defaultdict(deque)
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def fail(self, path: str, *faults: Fault) -> None:
        """Have the next requests of a path fail, one fault each."""
        self.faults[path].extend(faults)


class _Handler(BaseHTTPRequestHandler):
    server: FileServer

    def do_GET(self) -> None:
        path = self.path.lstrip("/")
        with self.server.lock:
            self.server.num_requests[path] += 1
            faults = self.server.faults[path]
            fault = faults.popleft() if faults else Fault()
        file = self.server.folder / path
        if fault.status == 200 and not file.is_file():
            fault = Fault(status=404)
        if fault.status != 200:
            self.send_error(fault.status)
            return
        content = bytearray(file.read_bytes())
        if fault.flipped_byte is not None:
            content[fault.flipped_byte] ^= 1
        length = len(content)
        if fault.cut_at is not None:
            del content[fault.cut_at :]
        self.send_response(200)
        self.send_header("Content-Length", str(len(content) if fault.is_short else length))
        self.end_headers()
        half = len(content) // 2
        self.wfile.write(content[:half])
        time.sleep(fault.pause_seconds)
        self.wfile.write(content[half:])
        self.close_connection = True

    def do_HEAD(self) -> None:
        file = self.server.folder / self.path.lstrip("/")
        self.send_response(200 if file.is_file() else 404)
        self.send_header("Content-Length", str(file.stat().st_size if file.is_file() else 0))
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def handle(self) -> None:
        # A client that was killed is nothing to report.
        try:
            super().handle()
        except ConnectionError:
            self.close_connection = True


@contextmanager
def serve_folder(folder: Path) -> Iterator[FileServer]:
    """Serve a folder from a thread of its own."""
    with FileServer(folder) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
