"""The page in a real browser: typing, clicking, choosing and dropping images, hostile captions."""

from __future__ import annotations

import threading

import pytest
from helpers.browser import Browser, find_browser
from search.conftest import COLOURS, SCRIPTS, square

pytestmark = pytest.mark.long

server = pytest.importorskip(
  "bigalign.search.server", reason="faiss or starlette is not installed: the extra search"
)


@pytest.fixture(scope="module")
def address(searcher):
  """The page, served on this machine by a thread."""
  ready, where = threading.Event(), []
  app = server.create_app(searcher, title="colours/*.tar")

  def at(url):
    where.append(url)
    ready.set()

  with server.running(app, server.listen("127.0.0.1", 0), at):
    assert ready.wait(10)
    yield where[0]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
  if not find_browser():
    pytest.skip("no Chromium or Chrome is installed")
  with Browser(tmp_path_factory.mktemp("browser")) as opened:
    yield opened


FIRST = "document.querySelector('#grid .card .caption')?.textContent"


def seen_first(browser, caption):
  """Waits until a caption is the first result and its image is shown."""
  browser.wait(f"{FIRST} === {caption!r}")
  browser.wait("document.querySelector('#grid img')?.naturalWidth > 0")


def colour_of_first(browser):
  """The colour in the middle of the first image, as it is painted."""
  return browser.run(
    "(async () => { const i = document.querySelector('#grid img'); await i.decode();"
    " const d = document.createElement('canvas').getContext('2d'); d.drawImage(i, 0, 0, 8, 8);"
    " return [...d.getImageData(4, 4, 1, 1).data].slice(0, 3); })()"
  )


def test_a_person_finds_an_image(browser, address, tmp_path):
  browser.open(address)
  browser.wait("document.querySelector('#about').textContent.includes('9 embeddings of colours')")
  browser.wait("document.querySelectorAll('#grid .card').length === 9")  # to begin with
  browser.click("input[name=q]")
  browser.type("something orange")
  seen_first(browser, "orange square")
  assert colour_of_first(browser) == pytest.approx(COLOURS["orange"], abs=4)
  assert browser.run("location.hash") == "#q=something+orange"
  # A neighbour of a result.
  browser.run("document.querySelectorAll('#grid .card').forEach((x, i) => x.id = 'card' + i)")
  browser.click("#card0")
  browser.wait("document.querySelector('#asked h2').textContent === 'Near: orange square'")
  seen_first(browser, "yellow square")
  assert not browser.run(
    "[...document.querySelectorAll('.caption')].some(x => x.textContent === 'orange square')"
  )
  # An image that is chosen, and one that is dropped.
  for name, give in (("green", "choose"), ("blue", "drop")):
    path = tmp_path / f"{name}.png"
    path.write_bytes(square(COLOURS[name]))
    if give == "choose":
      browser.choose("input[type=file]", path)
    else:
      browser.drop(path)
    seen_first(browser, f"{name} square")
    assert browser.run("document.querySelector('#drop').hidden")
  # The way back.
  browser.run("history.back()")
  browser.run("history.back()")
  browser.wait("document.querySelector('#asked h2').textContent === 'Near: orange square'")
  browser.run("history.back()")
  seen_first(browser, "orange square")
  assert browser.run("document.querySelector('input[name=q]').value") == "something orange"
  # A problem is said.
  path.write_bytes(b"not an image")
  browser.choose("input[type=file]", path)
  browser.wait("document.querySelector('#problem').textContent.includes('undecodable')")


def test_no_script_of_a_caption_or_an_address_runs(browser, address):
  browser.events.clear()
  for caption in SCRIPTS:
    browser.open(f"{address}#q={caption.split()[-1]}")
    browser.run("location.reload()")
    seen_first(browser, caption)
    browser.run("document.querySelector('#grid .card').click()")
    browser.wait(f"document.querySelector('#asked h2')?.textContent === {'Near: ' + caption!r}")
  browser.open(f"{address}#q=%3Cimg%20src%3Dx%20onerror%3D%22window.hit%3D4%22%3E")
  browser.run("location.reload()")
  browser.wait("document.querySelector('#asked h2')?.textContent.includes('onerror')")
  assert browser.run("window.hit === undefined && !document.querySelector('#grid script, svg')")
  # Even if a caption became HTML, the policy would refuse its script.
  browser.run("document.querySelector('#grid').innerHTML = '<img src=x onerror=\"window.hit=5\">'")
  browser.wait("document.querySelector('#grid img').complete")
  browser.run("new Promise(done => setTimeout(done, 300))")
  assert browser.run("window.hit === undefined")
  refused = [x for x in browser.events if x["method"] == "Log.entryAdded"]
  assert any("Content Security Policy" in x["params"]["entry"]["text"] for x in refused)
