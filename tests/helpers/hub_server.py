"""The Hugging Face hub on this machine: as much of its HTTP API as an upload asks for."""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import re
import threading
from typing import Any

import yaml

TOKEN = "hf_" + "secret" * 5
LICENSES = ("apache-2.0", "mit", "cc0-1.0", "other")
_LFS = (".safetensors", ".npz")


class Hub(http.server.ThreadingHTTPServer):
  """A server with the account "user".

  repos: {name: {"private": …, "files": {path: bytes}, "commits": [message, …]}}. role: of the
  token. answers: {(method, end of the path): (status, X-Error-Message)} that replace its own.
  """

  daemon_threads = True

  def __init__(self) -> None:
    super().__init__(("127.0.0.1", 0), _Handler)
    self.repos: dict[str, dict[str, Any]] = {}
    self.blobs: dict[str, bytes] = {}
    self.role = "write"
    self.answers: dict[tuple[str, str], tuple[int, str]] = {}
    self.asked: list[str] = []
    self.url = f"http://127.0.0.1:{self.server_port}"
    threading.Thread(target=self.serve_forever, daemon=True).start()


class _Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = "HTTP/1.1"
  disable_nagle_algorithm = True
  server: Hub

  def log_message(self, format: str, *args: Any) -> None:
    """Silent."""

  def do_GET(self) -> None:
    self._answer("GET")

  def do_POST(self) -> None:
    self._answer("POST")

  def do_PUT(self) -> None:
    self._answer("PUT")

  def _answer(self, method: str) -> None:
    path = self.path.partition("?")[0]
    body = self._body()
    self.server.asked.append(f"{method} {path}")
    for (of, end), (status, said) in self.server.answers.items():
      if of == method and path.endswith(end):
        self._send(status, {"error": said}, {"X-Error-Message": said})
        return
    if path.startswith("/upload/"):  # has its own signed address, and so no token
      self.server.blobs[path.rpartition("/")[2]] = body
      self._send(200, {})
    elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
      self._send(401, {"error": "Invalid username or password."})
    elif path == "/api/whoami-v2":
      token = {"displayName": "laptop", "role": self.server.role}
      self._send(200, {"type": "user", "name": "user", "orgs": [], "auth": {"accessToken": token}})
    elif path == "/api/repos/create":
      self._create(json.loads(body))
    elif path == "/api/validate-yaml":
      self._validate(json.loads(body)["content"])
    elif match := re.fullmatch(r"/api/models/(\w+/[\w-]+)", path):
      self._about(match[1])
    elif match := re.fullmatch(r"/api/models/(\w+/[\w-]+)/preupload/main", path):
      files = [
        {
          "path": x["path"],
          "uploadMode": "lfs" if x["path"].endswith(_LFS) else "regular",
          "shouldIgnore": False,
        }
        for x in json.loads(body)["files"]
      ]
      self._send(200, {"files": files})
    elif path.endswith(".git/info/lfs/objects/batch"):
      objects = [
        {**x, "actions": {"upload": {"href": f"{self.server.url}/upload/{x['oid']}"}}}
        for x in json.loads(body)["objects"]
      ]
      self._send(200, {"transfer": "basic", "objects": objects})
    elif match := re.fullmatch(r"/api/models/(\w+/[\w-]+)/commit/main", path):
      self._commit(match[1], [json.loads(line) for line in body.splitlines()])
    else:
      self._send(404, {"error": path})

  def _create(self, asked: dict[str, Any]) -> None:
    name = f"{asked.get('organization') or 'user'}/{asked['name']}"
    if not name.startswith("user/"):
      self._send(403, {"error": "You don't have the rights to create a model under this namespace"})
      return
    made = {"private": asked.get("visibility") == "private", "files": {}, "commits": []}
    status = 409 if name in self.server.repos else 200
    self.server.repos.setdefault(name, made)
    self._send(status, {"url": f"{self.server.url}/{name}", "name": name})

  def _about(self, name: str) -> None:
    if name not in self.server.repos:
      self._send(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
      return
    private = self.server.repos[name]["private"]
    self._send(200, {"id": name, "private": private, "tags": [], "siblings": []})

  def _validate(self, card: str) -> None:
    """The hub knows the identifiers of licenses."""
    front = yaml.safe_load(card.split("---\n")[1])
    wrong = front.get("license", "other") not in LICENSES
    errors = [{"message": f'"license" must be one of {", ".join(LICENSES)}'}] if wrong else []
    self._send(400 if wrong else 200, {"errors": errors, "warnings": []})

  def _commit(self, name: str, lines: list[dict[str, Any]]) -> None:
    repo = self.server.repos[name]
    for line in lines:
      value = line["value"]
      if line["key"] == "header":
        repo["commits"].append(value["summary"])
      elif line["key"] == "file":
        repo["files"][value["path"]] = base64.b64decode(value["content"])
      else:
        content = self.server.blobs[value["oid"]]
        assert hashlib.sha256(content).hexdigest() == value["oid"]
        repo["files"][value["path"]] = content
    url = f"{self.server.url}/{name}/commit/{'0' * 40}"
    self._send(200, {"success": True, "commitOid": "0" * 40, "commitUrl": url})

  def _body(self) -> bytes:
    if self.headers.get("Transfer-Encoding") == "chunked":
      parts = []
      while size := int(self.rfile.readline(), 16):
        parts.append(self.rfile.read(size))
        self.rfile.readline()
      self.rfile.readline()
      return b"".join(parts)
    return self.rfile.read(int(self.headers.get("Content-Length") or 0))

  def _send(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
    data = json.dumps(content).encode()
    self.send_response(status)
    for key, value in {"Content-Type": "application/json", **(headers or {})}.items():
      self.send_header(key, value)
    self.send_header("Content-Length", str(len(data)))
    self.end_headers()
    self.wfile.write(data)
