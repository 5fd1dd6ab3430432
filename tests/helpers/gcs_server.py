"""Google Cloud Storage on this machine: as much of its JSON API as checkpoints ask for."""

from __future__ import annotations

import http.server
import json
import re
import threading
import urllib.parse
from typing import Any, NamedTuple


class Object(NamedTuple):
  """Bytes under a name; the generation changes when they are written again."""

  data: bytes
  generation: int


class Bucket(http.server.ThreadingHTTPServer):
  """A server with one bucket, "bucket". writes: names in the order in which they were written."""

  daemon_threads = True
  request_queue_size = 256

  def __init__(self) -> None:
    super().__init__(("127.0.0.1", 0), _Handler)
    self.objects: dict[str, Object] = {}
    self.sessions: dict[str, tuple[str, bytearray]] = {}
    self.writes: list[str] = []
    self.lock = threading.Lock()
    self.url = f"http://127.0.0.1:{self.server_port}"
    threading.Thread(target=self.serve_forever, daemon=True).start()

  def environment(self) -> dict[str, str]:
    """What tells tensorstore, gcsfs and google-cloud-storage to come here."""
    return dict(
      TENSORSTORE_GCS_HTTP_URL=self.url,
      STORAGE_EMULATOR_HOST=self.url,
      GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT="false",  # asks another service, by gRPC
      GOOGLE_CLOUD_PROJECT="none",
    )

  def handle_error(self, request: Any, client_address: Any) -> None:
    """A client that hangs up is no error of the server."""


class _Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = "HTTP/1.1"
  disable_nagle_algorithm = True
  server: Bucket

  def log_message(self, format: str, *args: Any) -> None:
    """Silent."""

  def do_GET(self) -> None:
    path, asked = self._asked()
    if re.search(r"/b/bucket/?$", path):
      self._json(
        dict(
          kind="storage#bucket",
          name="bucket",
          location="US",
          timeCreated=_TIME,
          updated=_TIME,
          storageClass="STANDARD",
        )
      )
    elif re.search(r"/b/bucket/o/?$", path):
      self._list(asked)
    elif name := self._name(path):
      with self.server.lock:
        found = self.server.objects.get(name)
      if found is None or asked.get("ifGenerationMatch", str(found.generation)) != str(
        found.generation
      ):
        self._json(
          dict(error=dict(code=404 if found is None else 412, message=name)),
          404 if found is None else 412,
        )
      elif asked.get("ifGenerationNotMatch") == str(found.generation):
        self._bytes(b"", 304, found)
      elif asked.get("alt") == "media":
        self._media(found)
      else:
        self._json(_facts(name, found))
    else:
      self._json({}, 404)

  do_HEAD = do_GET

  def do_POST(self) -> None:
    body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
    _, asked = self._asked()
    if "upload_id" in asked:  # as gcsfs does it
      self._more(asked["upload_id"], body)
      return
    copy = re.search(r"/b/bucket/o/(.+)/(rewriteTo|copyTo)/b/bucket/o/(.+)$", self._raw)
    if copy:
      source, target = (urllib.parse.unquote(copy[i]) for i in (1, 3))
      with self.server.lock:
        found = self.server.objects.get(source)
      if found is None:
        self._json({}, 404)
      else:
        made = self._write(target, found.data, {})
        self._json(made | dict(done=True, resource=made) if made else {}, 200 if made else 412)
      return
    kind, name = asked.get("uploadType"), asked.get("name", "")
    if kind == "resumable":
      name = name or json.loads(body or b"{}").get("name", "")
      session = str(len(self.server.sessions))
      self.server.sessions[session] = name, bytearray()
      self._bytes(b"", 200, Location=f"{self.server.url}/session?upload_id={session}")
      return
    if kind == "multipart":
      mark = b"--" + self.headers["Content-Type"].split("boundary=")[1].strip("\"'").encode()
      about, content = body.split(mark)[1:3]
      name = json.loads(about.split(b"\r\n\r\n" if b"\r\n\r\n" in about else b"\n\n", 1)[1])["name"]
      end = b"\r\n\r\n" if b"\r\n\r\n" in content else b"\n\n"
      body = content.split(end, 1)[1].removesuffix(b"\r\n" if end == b"\r\n\r\n" else b"\n")
    made = self._write(name, body, asked)
    self._json(made or {}, 200 if made else 412)

  def do_PUT(self) -> None:
    body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
    self._more(self._asked()[1]["upload_id"], body)

  def _more(self, session: str, body: bytes) -> None:
    """Takes in a part of a resumable upload; the last one says how large it is in all."""
    name, held = self.server.sessions[session]
    held += body
    if self.headers.get("Content-Range", "").endswith("/*"):
      self._bytes(b"", 308, Range=f"bytes=0-{len(held) - 1}")
    else:
      self._json(self._write(name, bytes(held), {}) or {})

  def do_DELETE(self) -> None:
    with self.server.lock:
      gone = self.server.objects.pop(self._name(self._asked()[0]) or "", None)
    self._bytes(b"", 204 if gone else 404)

  def _asked(self) -> tuple[str, dict[str, str]]:
    self._raw, _, query = self.path.partition("?")
    return self._raw, dict(urllib.parse.parse_qsl(query))

  def _name(self, path: str) -> str | None:
    found = re.search(r"/b/bucket/o/(.+)$", path)
    return urllib.parse.unquote(found[1]) if found else None

  def _write(self, name: str, data: bytes, asked: dict[str, str]) -> dict[str, Any] | None:
    with self.server.lock:
      there = self.server.objects.get(name)
      wanted = asked.get("ifGenerationMatch")
      if wanted is not None and wanted != str(there.generation if there else 0):
        return None
      self.server.writes.append(name)
      made = self.server.objects[name] = Object(data, len(self.server.writes))
    return _facts(name, made)

  def _list(self, asked: dict[str, str]) -> None:
    prefix, mark = asked.get("prefix", ""), asked.get("delimiter", "")
    with self.server.lock:
      names = sorted(name for name in self.server.objects if name.startswith(prefix))
      items, prefixes = [], set()
      for name in names:
        head, found, _ = name[len(prefix) :].partition(mark) if mark else ("", "", "")
        if found:
          prefixes.add(prefix + head + mark)
        elif name >= asked.get("startOffset", ""):
          items.append(_facts(name, self.server.objects[name]))
    self._json(dict(kind="storage#objects", items=items, prefixes=sorted(prefixes)))

  def _media(self, found: Object) -> None:
    asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
    if not asked:
      self._bytes(found.data, 200, found)
      return
    start, end = int(asked[1]), int(asked[2] or len(found.data) - 1) + 1
    if start >= len(found.data):
      self._bytes(b"", 416, found)
      return
    end = min(end, len(found.data))
    self._bytes(
      found.data[start:end],
      206,
      found,
      **{"Content-Range": f"bytes {start}-{end - 1}/{len(found.data)}"},
    )

  def _json(self, value: Any, status: int = 200) -> None:
    self._bytes(json.dumps(value).encode(), status, **{"Content-Type": "application/json"})

  def _bytes(self, data: bytes, status: int, found: Object | None = None, **headers: str) -> None:
    self.send_response(status)
    if found:
      headers["x-goog-generation"] = str(found.generation)
    for name, value in headers.items():
      self.send_header(name, value)
    self.send_header("Content-Length", str(len(data)))
    self.end_headers()
    if self.command != "HEAD":
      self.wfile.write(data)


_TIME = "2026-01-01T00:00:00.000Z"


def _facts(name: str, found: Object) -> dict[str, Any]:
  return dict(
    kind="storage#object",
    name=name,
    bucket="bucket",
    size=str(len(found.data)),
    generation=str(found.generation),
    metageneration="1",
    timeCreated=_TIME,
    updated=_TIME,
    storageClass="STANDARD",
    contentType="application/octet-stream",
    etag=str(found.generation),
  )
