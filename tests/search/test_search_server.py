"""The web interface of the search: what it answers, and what it refuses."""

from __future__ import annotations

import concurrent.futures
import doctest
import io
import re
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.small_shards import write_tar
from PIL import Image
from search.conftest import COLOURS, square, write_store

testclient = pytest.importorskip(
  "starlette.testclient", reason="faiss or starlette is not installed: the extra search"
)
server = pytest.importorskip(
  "bigalign.search.server", reason="faiss or starlette is not installed: the extra search"
)

from bigalign.api.image_inputs import View  # noqa: E402
from bigalign.data.image.reading import ImageReading  # noqa: E402
from bigalign.data.sources.base import open_source  # noqa: E402
from bigalign.search import collection, main  # noqa: E402


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


def sideways(size=(1600, 1200)):
  """A JPEG whose upper half is red as it is stored, of a camera that was turned: EXIF 6."""
  image = Image.new("RGB", size, (0, 0, 255))
  image.paste((255, 0, 0), (0, 0, size[0], size[1] // 2))
  exif = Image.Exif()
  exif[0x0112] = 6  # orientation: a quarter turn clockwise shows it upright
  file = io.BytesIO()
  image.save(file, "jpeg", exif=exif)
  return file.getvalue()


def test_photos_are_shown_upright_and_decoded_no_larger_than_needed(tmp_path, monkeypatch):
  path = write_tar(tmp_path / "0.tar", [("0.jpg", sideways())])
  source = open_source(path, captions=())
  store = write_store(tmp_path / "store", np.ones((1, 3)), keys=[source[0]["key"]])
  photos = collection.Collection(store, source)
  assert photos.image(0, size=64).shape == (200, 150, 3)  # an eighth of 1600, turned
  assert photos.image(0, size=101).shape == (400, 300, 3)  # an eighth is less than twice the size
  assert photos.image(0, size=2048).shape == (1600, 1200, 3)
  shown = Image.open(io.BytesIO(server.thumbnail(SimpleNamespace(collection=photos), 0, 80)))
  pixels = np.asarray(shown).astype(int)
  assert shown.size == (60, 80)
  assert (pixels[:, :25, 2] > 200).all() and (pixels[:, 35:, 0] > 200).all()


def test_uploads_are_decoded_as_the_model_decodes(monkeypatch):
  model = SimpleNamespace(view=View(ImageReading(image_size=8, apply_exif=True)))
  assert server.pixels(model, sideways((20, 10))).shape == (20, 10, 3)
  model.view = View(ImageReading(image_size=8))
  assert server.pixels(model, sideways((20, 10))).shape == (10, 20, 3)
  file = io.BytesIO()
  Image.new("RGBA", (4, 4), (9, 9, 9, 0)).save(file, "png")
  assert server.pixels(model, file.getvalue()).max() == 255  # blended with white
  model.view = View(ImageReading(image_size=8, pillow_rgb=True))
  assert server.pixels(model, file.getvalue()).max() == 9


def test_uploads_are_decoded_once_and_few_at_a_time(searcher, monkeypatch):
  now, most, lock = [0], [0], threading.Lock()

  def images(given, k):
    assert isinstance(given[0], np.ndarray)  # nothing is left to be decoded under the lock
    with lock:
      now[0] += 1
      most[0] = max(most[0], now[0])
    time.sleep(0.02)
    with lock:
      now[0] -= 1
    return [[]]

  monkeypatch.setattr(server, "_DECODES", 2)
  monkeypatch.setattr(searcher, "images", images)
  app = server.create_app(searcher, title="")
  client = testclient.TestClient(app, "http://localhost")
  with concurrent.futures.ThreadPoolExecutor(6) as pool:
    post = [pool.submit(client.post, "/api/search", content=square((9, 9, 9))) for _ in range(6)]
  assert [x.result().status_code for x in post] == [200] * 6
  assert most == [2]


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
    ({"origin": "http://[evil"}, 403),
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
  monkeypatch.setattr(server, "serve", lambda app, listens, ready: made.update(listens=listens))
  monkeypatch.setattr(searcher, "warm_up", lambda: made.update(warm=True))
  main.serve(searcher, "x", host, "a socket")
  assert made == dict(listens="a socket", warm=True) and ("no password" in caplog.text) != loopback


def test_the_address_of_the_page_is_shown(searcher):
  shown = []
  app = server.create_app(searcher, title="")
  listening = server.listen("127.0.0.1", 0)
  port = listening.getsockname()[1]
  with server.running(app, listening, shown.append):
    assert shown == [f"http://127.0.0.1:{port}/"]


def test_a_taken_port_is_reported_before_a_model_is_loaded(monkeypatch):
  monkeypatch.setattr(main, "load", None)
  with server.listen("127.0.0.1", 0) as taken:
    port = str(taken.getsockname()[1])
    with pytest.raises(OSError, match=f"--port={port}: .*name another, or --port=0"):
      main.main(["random", "x.tar", "--serve", "--port", port])
