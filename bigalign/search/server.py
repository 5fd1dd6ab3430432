"""The web page of `bigalign search --serve`: a small JSON interface and one page that uses it.

  GET  /                           the page
  GET  /api/about                  what is searched
  GET  /api/search?q=TEXT&k=24     results of a text
  POST /api/search?k=24            results of an image, the body of the request
  GET  /api/neighbours?row=7&k=24  results near a row
  GET  /api/some?k=12              some rows, to begin with
  GET  /image/7?size=320           the image of a row as JPEG, at most `size` pixels wide and high

Captions and images come from strangers. The page shows captions as text only, its policy allows no
script but its own, and images are decoded here and encoded again. Requests for another host name
(DNS rebinding) and from other web pages are refused.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import ipaddress
import pathlib
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import uvicorn
from PIL import Image
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bigalign.data.image.decode import decode
from bigalign.data.samples.rejects import Rejected
from bigalign.search.searcher import Result, Searcher

MOST_RESULTS = 200
MOST_TEXT = 2000  # characters of a query
MOST_UPLOAD = 20 << 20  # bytes of an image
MOST_PIXELS = 64_000_000  # of an image
_SIZES = (64, 2048)  # pixels of a thumbnail, least and most
_DECODES = 4  # uploads, and thumbnails, that are in memory at a time
_HEADERS = {
  "X-Content-Type-Options": "nosniff",
  "X-Frame-Options": "DENY",
  "Referrer-Policy": "no-referrer",
  "Cross-Origin-Resource-Policy": "same-origin",
  "Cross-Origin-Opener-Policy": "same-origin",
}


def page() -> tuple[str, str]:
  """Returns the HTML of the page and its Content-Security-Policy.

  The policy names the page's script and style by their hashes, so that no other script runs.
  """
  html = pathlib.Path(__file__).with_name("page.html").read_text(encoding="utf-8")

  def hashes(tag: str) -> str:
    texts = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
    digests = (hashlib.sha256(text.encode()).digest() for text in texts)
    return " ".join(f"'sha256-{base64.b64encode(x).decode()}'" for x in digests)

  policy = (
    f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')};"
    " img-src 'self' blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none';"
    " frame-ancestors 'none'"
  )
  return html, policy


def is_allowed_host(header: str, names: frozenset[str]) -> bool:
  """Whether the Host of a request is one of ours.

  A web page of an attacker can let its own name point to this machine (DNS rebinding), but it
  cannot use an address, so any address is allowed.

  >>> names = frozenset({"localhost"})
  >>> [is_allowed_host(x, names) for x in ("localhost:8000", "[::1]:80", "10.0.0.7", "a.example")]
  [True, True, True, False]

  Args:
    header: of the request, with or without a port.
    names: other names that are allowed.
  """
  try:
    name = urlsplit(f"//{header}").hostname or ""
  except ValueError:
    return False
  if name in names:
    return True
  try:
    ipaddress.ip_address(name)
  except ValueError:
    return False
  return True


class _Guard:
  """Refuses requests for other hosts and from other web pages; adds headers to all responses."""

  def __init__(self, app: ASGIApp, names: frozenset[str]):
    self._app, self._names = app, names

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] != "http":
      await self._app(scope, receive, send)
      return

    async def send_with_headers(message: Message) -> None:
      if message["type"] == "http.response.start":
        added = [(k.lower().encode(), v.encode()) for k, v in _HEADERS.items()]
        message = {**message, "headers": [*message["headers"], *added]}
      await send(message)

    refused = self._refusal(Request(scope))
    await (refused or self._app)(scope, receive, send_with_headers)

  def _refusal(self, request: Request) -> Response | None:
    host, origin = request.headers.get("host", ""), request.headers.get("origin")
    if not is_allowed_host(host, self._names):
      return JSONResponse({"error": f"unknown host {host[:100]!r}"}, 421)
    foreign = origin is not None and not _is_origin(origin, host)
    # A link from elsewhere may open the page, and nothing else.
    linked = request.headers.get("sec-fetch-site") in ("cross-site", "same-site")
    if foreign or (linked and request.url.path != "/"):
      return JSONResponse({"error": "a request from another web page"}, 403)
    return None


def _is_origin(origin: str, host: str) -> bool:
  """Whether the Origin of a request is a page of this host."""
  try:
    return urlsplit(origin).netloc == host
  except ValueError:  # for example, a bracket that is not closed
    return False


def create_app(
  searcher: Searcher, *, title: str, names: frozenset[str] = frozenset({"localhost"})
) -> ASGIApp:
  """Returns the web application.

  Args:
    searcher: answers the queries.
    title: of what is searched.
    names: host names under which it is reached, besides addresses.
  """
  html, policy = page()
  version = searcher.collection.store.fingerprint[:12]
  uploads, thumbnails = (threading.BoundedSemaphore(_DECODES) for _ in range(2))

  def by_image(data: bytes, k: int) -> list[Result]:
    with uploads:
      (found,) = searcher.images([pixels(searcher.model, data)], k)
    return found

  def encoded(row: int, size: int) -> bytes:
    with thumbnails:
      return thumbnail(searcher, row, size)

  def shown(results: list[Result], seconds: float) -> dict[str, Any]:
    answers = [result.as_json() for result in results]
    for answer in answers:
      answer["image"] = f"/image/{answer['row']}?v={version}"
    return dict(results=answers, seconds=round(seconds, 4))

  async def index(request: Request) -> Response:
    headers = {"Content-Security-Policy": policy, "Cache-Control": "no-cache"}
    return HTMLResponse(html, headers=headers)

  async def about(request: Request) -> Response:
    return JSONResponse(
      dict(
        title=title,
        model=searcher.model.source,
        rows=len(searcher.collection),
        images=searcher.collection.source is not None,
      )
    )

  async def search(request: Request) -> Response:
    k = _number(request, "k", 24, 1, MOST_RESULTS)
    begin = time.perf_counter()
    if request.method == "POST":
      data = await _body(request)
      found = await _run(lambda: by_image(data, k))
    else:
      text = request.query_params.get("q", "").strip()
      if not text or len(text) > MOST_TEXT:
        raise HTTPException(400, f"q: a text of 1 to {MOST_TEXT} characters")
      (found,) = await _run(lambda: searcher.texts([text], k))
    return JSONResponse(shown(found, time.perf_counter() - begin))

  async def neighbours(request: Request) -> Response:
    row = _number(request, "row", None, 0, len(searcher.collection) - 1)
    k = _number(request, "k", 24, 1, MOST_RESULTS)
    begin = time.perf_counter()
    found = await _run(lambda: searcher.neighbours(row, k))
    answer = shown(found, time.perf_counter() - begin)
    own = Result(0, 1.0, await _run(lambda: searcher.collection.item(row)))
    answer["query"] = shown([own], 0)["results"][0]
    return JSONResponse(answer)

  async def some(request: Request) -> Response:
    k = _number(request, "k", 12, 1, MOST_RESULTS)
    begin = time.perf_counter()
    found = await _run(lambda: searcher.some(k))
    return JSONResponse(shown(found, time.perf_counter() - begin))

  async def image(request: Request) -> Response:
    row = request.path_params["row"]
    if row >= len(searcher.collection):
      raise HTTPException(404, f"row {row} of {len(searcher.collection)}")
    size = _number(request, "size", 320, *_SIZES)
    data = await _run(lambda: encoded(row, size))
    headers = {
      "Cache-Control": "private, max-age=86400",
      "Content-Security-Policy": "default-src 'none'",
    }
    return Response(data, media_type="image/jpeg", headers=headers)

  async def error(request: Request, problem: Exception) -> Response:
    status = problem.status_code if isinstance(problem, HTTPException) else 500
    text = problem.detail if isinstance(problem, HTTPException) else "an error; see the terminal"
    return JSONResponse({"error": text}, status)

  app = Starlette(
    routes=[
      Route("/", index),
      Route("/api/about", about),
      Route("/api/search", search, methods=["GET", "POST"]),
      Route("/api/neighbours", neighbours),
      Route("/api/some", some),
      Route("/image/{row:int}", image),
    ],
    exception_handlers={HTTPException: error, 500: error},
  )
  return _Guard(app, names)  # outside of Starlette's own handling of errors


async def _run(work: Callable[[], Any]) -> Any:
  """Runs `work` in a thread; what is wrong with an image or a source becomes a response."""
  try:
    return await run_in_threadpool(work)
  except Rejected as problem:
    raise HTTPException(422, f"the image cannot be read: {problem}") from problem
  except ValueError as problem:
    raise HTTPException(422, str(problem)) from problem


def _number(request: Request, name: str, default: int | None, least: int, most: int) -> int:
  """A parameter of the request."""
  text = request.query_params.get(name, "" if default is None else str(default))
  if not re.fullmatch(r"\d{1,18}", text) or not least <= int(text) <= most:
    raise HTTPException(400, f"{name}={text[:20]!r}: a number from {least} to {most}")
  return int(text)


async def _body(request: Request) -> bytes:
  """The body of the request; 413 if it is too large, as soon as that is known."""
  data = bytearray()
  async for chunk in request.stream():
    data += chunk
    if len(data) > MOST_UPLOAD:
      raise HTTPException(413, f"the image has more than {MOST_UPLOAD >> 20} MiB")
  if not data:
    raise HTTPException(400, "the body of the request is an image file")
  return bytes(data)


def pixels(model: Any, data: bytes) -> np.ndarray:
  """Returns an uploaded image, uint8 [H, W, 3], decoded as the model decodes images.

  Args:
    model: that embeds it.
    data: of the file.

  Raises:
    Rejected: for anything that is not a whole image of at most MOST_PIXELS.
  """
  view = getattr(model, "view", None)
  kinds = view.reading.colours if view else {}
  return decode(data, max_pixels=MOST_PIXELS, **kinds)


def thumbnail(searcher: Searcher, row: int, size: int) -> bytes:
  """Returns the image of a row as JPEG, at most `size` pixels wide and high, without metadata."""
  image = Image.fromarray(searcher.collection.image(row, size=size))
  image.thumbnail((size, size))
  file = io.BytesIO()
  image.save(file, "jpeg", quality=88)
  return file.getvalue()


def is_loopback(host: str) -> bool:
  """Whether only this machine reaches a server on this address."""
  if host == "localhost":
    return True
  try:
    return ipaddress.ip_address(host).is_loopback
  except ValueError:
    return False


def listen(host: str, port: int) -> socket.socket:
  """Returns a socket that keeps the port; requests wait until a server answers them.

  Args:
    host: address to listen on.
    port: to listen on; 0: any that is free.

  Raises:
    OSError: if the port is taken or the address is not one of this machine.
  """
  family = socket.AF_INET6 if ":" in host else socket.AF_INET
  try:
    return socket.create_server((host, port), family=family)
  except OSError as error:
    raise OSError(
      f"--host={host} --port={port}: {error.strerror}; name another, or --port=0 for a free one"
    ) from error


@contextlib.contextmanager
def running(
  app: ASGIApp, listening: socket.socket, ready: Callable[[str], None]
) -> Iterator[threading.Thread]:
  """A context in which a thread serves the page.

  Args:
    app: of `create_app`.
    listening: of `listen`; it is closed at the end.
    ready: is called with the address of the page.
  """
  server = uvicorn.Server(
    uvicorn.Config(app, log_level="warning", server_header=False, lifespan="off")
  )
  # In a thread uvicorn leaves Ctrl-C to the program.
  thread = threading.Thread(target=server.run, kwargs=dict(sockets=[listening]), daemon=True)
  with listening:
    thread.start()
    try:
      address, port = listening.getsockname()[:2]
      ready(f"http://{f'[{address}]' if ':' in address else address}:{port}/")
      yield thread
    finally:
      server.should_exit = True
      thread.join(10)


def serve(app: ASGIApp, listening: socket.socket, ready: Callable[[str], None]) -> None:
  """Serves the page until Ctrl-C; the arguments are those of `running`."""
  with contextlib.suppress(KeyboardInterrupt), running(app, listening, ready) as thread:
    while thread.is_alive():
      thread.join(1)
