"""The web interface of the search: what it answers, and what it refuses."""

from __future__ import annotations

import doctest
import io
import re

import numpy as np
import pytest
from PIL import Image
from search.conftest import COLOURS, square

testclient = pytest.importorskip(
  "starlette.testclient", reason="faiss or starlette is not installed: the extra search"
)
server = pytest.importorskip(
  "bigalign.search.server", reason="faiss or starlette is not installed: the extra search"
)

from bigalign.search import main  # noqa: E402


@pytest.fixture(scope="module")
def client(searcher):
  app = server.create_app(searcher, title="colours/*.tar", names=frozenset({"localhost"}))
  return testclient.TestClient(app, base_url="http://localhost:8000")


def test_examples():
  assert doctest.testmod(server).failed == 0


def test_a_text_finds_its_image(client):
  for name in COLOURS:
    answer = client.get("/api/search", params={"q": f"a {name} thing", "k": 3}).json()
    assert len(answer["results"]) == 3
    best = answer["results"][0]
    assert best["captions"] == [f"{name} square"] and best["rank"] == 1
    assert best["score"] == pytest.approx(1, abs=1e-3)
    pixels = np.asarray(Image.open(io.BytesIO(client.get(best["image"]).content)))
    np.testing.assert_allclose(pixels.mean((0, 1)), COLOURS[name], atol=3)


def test_an_image_finds_itself_and_a_row_its_neighbours(client):
  answer = client.post("/api/search?k=1", content=square(COLOURS["green"])).json()
  assert answer["results"][0]["captions"] == ["green square"]
  answer = client.get("/api/neighbours?row=1&k=2").json()
  assert answer["query"]["captions"] == ["orange square"]
  assert [x["row"] for x in answer["results"]] == [2, 0]
  assert [x["rank"] for x in answer["results"]] == [1, 2]


def test_some_images_to_begin_with(client):
  rows = [x["row"] for x in client.get("/api/some?k=4").json()["results"]]
  assert len(set(rows)) == 4 and rows == [
    x["row"] for x in client.get("/api/some?k=4").json()["results"]
  ]
  assert len(client.get("/api/some?k=100").json()["results"]) == 9


def test_what_is_searched(client):
  about = client.get("/api/about").json()
  assert about == dict(title="colours/*.tar", model="colours", rows=9, images=True)


def test_images_are_encoded_again_and_bounded(client):
  response = client.get("/image/0?size=64")
  assert response.headers["content-type"] == "image/jpeg"
  assert Image.open(io.BytesIO(response.content)).size == (48, 64)
  assert client.get("/image/99").status_code == 404
  assert client.get("/image/0?size=9999").status_code == 400


@pytest.mark.parametrize(
  "path, status, message",
  [
    ("/api/search", 400, "q: a text of 1 to 2000"),
    (f"/api/search?q={'a' * 2001}", 400, "q: a text of 1 to 2000"),
    ("/api/search?q=red&k=0", 400, "k='0': a number from 1 to 200"),
    ("/api/search?q=red&k=1e9", 400, "k='1e9'"),
    ("/api/neighbours?row=9", 400, "row='9': a number from 0 to 8"),
    ("/api/neighbours", 400, "row=''"),
    ("/image/-1", 404, "Not Found"),
    ("/../etc/passwd", 404, "Not Found"),
  ],
)
def test_wrong_requests_are_answered_with_their_reason(client, path, status, message):
  response = client.get(path)
  assert response.status_code == status and message in response.json()["error"]


def test_uploads_that_are_not_images_are_refused(client, monkeypatch):
  response = client.post("/api/search", content=b"<html>")
  assert response.status_code == 422 and "undecodable" in response.json()["error"]
  assert client.post("/api/search", content=b"").status_code == 400
  monkeypatch.setattr(server, "MOST_UPLOAD", 1000)
  assert client.post("/api/search", content=b"x" * 1001).status_code == 413
  monkeypatch.setattr(server, "MOST_PIXELS", 10)
  response = client.post("/api/search", content=square((0, 0, 0)))
  assert response.status_code == 422 and "too_large" in response.json()["error"]


@pytest.mark.parametrize(
  "headers, status",
  [
    ({"host": "localhost"}, 200),
    ({"host": "127.0.0.1:8000"}, 200),
    ({"host": "[::1]:8000"}, 200),
    ({"host": "evil.example"}, 421),
    ({"host": "localhost.evil.example:8000"}, 421),
    ({"host": "[evil"}, 421),
    ({"host": ""}, 421),
    ({"origin": "http://localhost:8000"}, 200),
    ({"origin": "http://evil.example"}, 403),
    ({"origin": "null"}, 403),
    ({"sec-fetch-site": "same-origin"}, 200),
    ({"sec-fetch-site": "cross-site"}, 403),
  ],
)
def test_other_hosts_and_other_pages_are_refused(client, headers, status):
  for path in ("/api/search?q=red", "/image/0"):
    assert client.get(path, headers=headers).status_code == status
  post = client.post("/api/search", content=square(COLOURS["red"]), headers=headers)
  assert post.status_code == status


def test_a_link_may_open_the_page(client):
  assert client.get("/", headers={"sec-fetch-site": "cross-site"}).status_code == 200


def test_the_page_runs_no_script_but_its_own(client):
  response = client.get("/")
  policy = response.headers["content-security-policy"]
  assert "default-src 'none'" in policy and "unsafe" not in policy
  assert policy.count("'sha256-") == 2 and "frame-ancestors 'none'" in policy
  assert not re.findall(r"\son\w+=|javascript:|innerHTML|outerHTML|insertAdjacent", response.text)
  for path in ("/", "/api/search?q=red", "/image/0", "/nothing"):
    assert client.get(path).headers["x-content-type-options"] == "nosniff"


def test_a_caption_with_a_script_is_data(client):
  response = client.get("/api/search", params={"q": "magenta", "k": 1})
  assert response.headers["content-type"] == "application/json"
  assert response.json()["results"][0]["captions"][0].startswith("<script>")


def test_bugs_are_not_shown_to_the_web(searcher, monkeypatch):
  app = server.create_app(searcher, title="")
  client = testclient.TestClient(app, "http://localhost", raise_server_exceptions=False)
  monkeypatch.setattr(searcher, "texts", lambda *args: {}["secret"])
  response = client.get("/api/search?q=red")
  assert response.status_code == 500 and "secret" not in response.text
  assert response.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
  "host, loopback",
  [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("box", False)],
)
def test_addresses_that_others_reach_are_warned_about(
  searcher, monkeypatch, caplog, host, loopback
):
  made = {}
  monkeypatch.setattr(server, "serve", lambda app, host, port, ready: made.update(host=host))
  monkeypatch.setattr(searcher, "warm_up", lambda: made.update(warm=True))
  main.serve(searcher, "x", host, 0)
  assert made == dict(host=host, warm=True) and ("no password" in caplog.text) != loopback
