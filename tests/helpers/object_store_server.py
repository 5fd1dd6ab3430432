"""A store of objects on this machine: ranges, latency, and failures as they are asked for."""

from __future__ import annotations

import contextlib
import http.server
import pathlib
import re
import socket
import threading
import time
from collections.abc import Iterator


class Store(http.server.ThreadingHTTPServer):
  """Serves the files of a folder; `failures` are the answers to the next requests.

  A failure is a status, or 0 for a connection that is broken off.
  """

  daemon_threads = True
  request_queue_size = 256

  def __init__(self, folder: pathlib.Path, *, latency: float = 0.0):
    super().__init__(("127.0.0.1", 0), _Handler)
    self.folder, self.latency = folder, latency
    self.failures: list[int] = []
    self.requests: list[tuple[str, int]] = []  # (name, bytes sent) of each GET
    self.lock = threading.Lock()
    self.url = f"http://127.0.0.1:{self.server_port}"

  def handle_error(self, request, client_address) -> None:
    """A client that hangs up is no error of the store."""


class _Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = "HTTP/1.1"
  disable_nagle_algorithm = True
  server: Store

  def log_message(self, format, *args) -> None:
    """Silent."""

  def do_HEAD(self) -> None:
    self.do_GET()

  def do_GET(self) -> None:
    time.sleep(self.server.latency)
    with self.server.lock:
      failure = self.server.failures.pop(0) if self.server.failures else None
    if failure == 0:
      self.close_connection = True
      self.connection.shutdown(socket.SHUT_RDWR)
      return
    path = self.server.folder / self.path.lstrip("/")
    if failure or not path.is_file():
      self._answer(failure or 404, b"")
      return
    status = path.stat()
    size, tag = status.st_size, f'"{status.st_mtime_ns:x}-{status.st_size:x}"'
    last = re.fullmatch(r"bytes=-(\d+)", self.headers.get("Range") or "")
    if last:
      self.headers.replace_header("Range", f"bytes={max(size - int(last[1]), 0)}-")
    asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
    first, last = (int(asked[1]), min(int(asked[2] or size), size - 1)) if asked else (0, size - 1)
    if asked and first >= size:
      self._answer(416, b"", tag)
      return
    with path.open("rb") as file:
      file.seek(first)
      body = file.read(last + 1 - first)
    self._answer(
      206 if asked else 200, body, tag, span=f"bytes {first}-{last}/{size}" if asked else ""
    )

  def _answer(self, status: int, body: bytes, tag: str = "", *, span: str = "") -> None:
    self.send_response(status)
    self.send_header("Content-Length", str(len(body)))
    if span:
      self.send_header("Content-Range", span)
    if tag:
      self.send_header("ETag", tag)
    self.end_headers()
    if self.command == "GET":
      with self.server.lock:  # before the client has the answer, and counts
        self.server.requests.append((self.path.lstrip("/"), len(body)))
      self.wfile.write(body)


@contextlib.contextmanager
def store(folder: pathlib.Path, *, latency: float = 0.0) -> Iterator[Store]:
  """A store that serves while the context lasts."""
  with Store(folder, latency=latency) as server:
    thread = threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.01))
    thread.start()
    try:
      yield server
    finally:
      server.shutdown()
      thread.join()
