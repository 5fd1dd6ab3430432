"""A headless Chromium that a test drives as a person does, over the DevTools protocol.

Commands and events go through two pipes (--remote-debugging-pipe), so no driver is needed.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import sys
import time

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# The browser reads commands from descriptor 3 and writes to 4.
_START = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(x), fcntl.F_DUPFD, 10) for x in sys.argv[1:3]]
os.dup2(ends[0], 3), os.dup2(ends[1], 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


def find_browser():
  """The path of an installed Chromium or Chrome, or None."""
  return next((path for path in map(shutil.which, NAMES) if path), None)


class Browser:
  """One page of a browser.

  Args:
    folder: for the profile of the browser.
    size: of the window, pixels.
  """

  def __init__(self, folder, *, size=(1280, 900)):
    commands, self._write = os.pipe()
    self._read, events = os.pipe()
    self._process = subprocess.Popen(
      [
        *(sys.executable, "-S", "-c", _START, str(commands), str(events), find_browser()),
        *("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run"),
        *("--disable-dev-shm-usage", "--disable-background-networking", "--disable-extensions"),
        *(f"--window-size={size[0]},{size[1]}", f"--user-data-dir={folder}"),
        *("--remote-debugging-pipe", "about:blank"),
      ],
      pass_fds=(commands, events),
      stdout=subprocess.DEVNULL,
      stderr=subprocess.DEVNULL,
    )
    os.close(commands)
    os.close(events)
    self._data, self._number, self._session = b"", 0, {}
    self.events = []
    try:
      target = self.send("Target.createTarget", url="about:blank")["targetId"]
      attached = self.send("Target.attachToTarget", targetId=target, flatten=True)
      self._session = {"sessionId": attached["sessionId"]}
      for domain in ("Page", "Runtime", "DOM", "Log"):
        self.send(f"{domain}.enable")
    except BaseException:
      self.close()
      raise

  def close(self):
    """Ends the browser."""
    self._process.kill()
    self._process.wait()
    for end in (self._read, self._write):
      with contextlib.suppress(OSError):
        os.close(end)

  def __enter__(self):
    return self

  def __exit__(self, *exception):
    self.close()

  def send(self, method, **params):
    """The result of a command of the protocol."""
    self._number += 1
    command = {"id": self._number, "method": method, "params": params, **self._session}
    os.write(self._write, json.dumps(command).encode() + b"\0")
    end = time.monotonic() + 60
    while True:
      while b"\0" not in self._data:
        ready, _, _ = select.select([self._read], [], [], max(0, end - time.monotonic()))
        assert ready, f"no answer to {method}"
        more = os.read(self._read, 1 << 20)
        assert more, f"the browser ended in {method}"
        self._data += more
      text, _, self._data = self._data.partition(b"\0")
      message = json.loads(text)
      if message.get("id") == self._number:
        assert "error" not in message, f"{method}: {message['error']}"
        return message["result"]
      self.events.append(message)

  def open(self, url):
    """Goes to an address and waits until the page is loaded."""
    self.send("Page.navigate", url=url)
    self.wait(f"location.href.startsWith({url!r}) && document.readyState === 'complete'")

  def run(self, script):
    """The value of a JavaScript expression; waits for promises."""
    result = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
    assert "exceptionDetails" not in result, result["exceptionDetails"]
    return result["result"].get("value")

  def wait(self, script, *, seconds=30):
    """Waits until a JavaScript expression is true."""
    end = time.monotonic() + seconds
    while not self._is_true(script):
      assert time.monotonic() < end, f"still false: {script}\n{self.run('document.body.innerText')}"
      time.sleep(0.05)

  def _is_true(self, script):
    """Whether an expression is true; False while the page is replaced, as by a reload."""
    try:
      return self.run(f"Boolean({script})")
    except AssertionError as error:
      if "navigated or closed" not in str(error):
        raise
      return False

  def click(self, selector):
    """Presses and releases the left button in the middle of an element."""
    x, y = self.run(
      f"(() => {{ const e = document.querySelector({selector!r}); e.scrollIntoView();"
      " const r = e.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]; })()"
    )
    for kind in ("mousePressed", "mouseReleased"):
      self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

  def type(self, text, *, enter=True):
    """Types into the focused element."""
    for letter in text:
      self.send("Input.dispatchKeyEvent", type="keyDown", text=letter)
      self.send("Input.dispatchKeyEvent", type="keyUp")
    if enter:
      for kind in ("keyDown", "keyUp"):
        self.send(
          "Input.dispatchKeyEvent", type=kind, key="Enter", windowsVirtualKeyCode=13, text="\r"
        )

  def choose(self, selector, path):
    """Chooses a file in an <input type=file>."""
    root = self.send("DOM.getDocument")["root"]["nodeId"]
    node = self.send("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
    self.send("DOM.setFileInputFiles", nodeId=node, files=[str(path)])

  def drop(self, path, *, x=600, y=500):
    """Drags a file from outside into the page and drops it."""
    data = {"items": [], "files": [str(path)], "dragOperationsMask": 1}
    for kind in ("dragEnter", "dragOver", "drop"):
      self.send("Input.dispatchDragEvent", type=kind, x=x, y=y, data=data)

  def screenshot(self, path):
    """Writes a PNG of the window."""
    path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot")["data"]))
