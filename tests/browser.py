"""Headless Chromium through the DevTools protocol: pages at a phone's and a screen's width."""

import base64
import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import tempfile
import time
from pathlib import Path

from websockets.sync.client import connect

PROGRAM = "chromium"
FLAGS = (
    "--headless=new",
    "--no-sandbox",  # it needs user namespaces, which containers lack
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--remote-debugging-port=0",
    # A mouse, which headless Chromium lacks; a phone's width has none all the same.
    "--blink-settings=primaryHoverType=2,availableHoverTypes=2,"
    "primaryPointerType=4,availablePointerTypes=4",
)
OVERFLOWS = """
(() => {
  const width = document.documentElement.clientWidth, found = [];
  if (document.documentElement.scrollWidth > width) found.push("the page");
  for (const e of document.querySelectorAll("main *")) {
    const box = e.getBoundingClientRect();
    if (box.width && (box.right > width + 1 || box.left < -1) && !e.closest(".scroll, svg, .chart"))
      found.push(`${e.tagName}.${e.className}: ${box.left} to ${box.right}`);
  }
  for (const e of document.querySelectorAll("dd, p, h1, h2, h3, figcaption")) {
    if (e.offsetWidth && e.scrollWidth > e.clientWidth + 1) found.push(`text in ${e.tagName}`);
    if (e.offsetWidth && e.offsetWidth < 60 && e.textContent.length > 40) {
      found.push(`${e.tagName} of ${e.offsetWidth} px for ${e.textContent.length} letters`);
    }
  }
  return found;
})()
"""
"""Elements that reach beyond the page, but for those that scroll by themselves, and texts that are
squeezed."""


class Browser:
    """One tab of a headless Chromium; a context manager.

    Attributes:
        errors: what pages reported: exceptions, errors on the console, and refused requests.
        requests: addresses that pages asked for, apart from those of their own data.
    """

    def __init__(self) -> None:
        self.errors: list[str] = []
        self.requests: list[str] = []
        self._numbers = itertools.count(1)
        self._profile = tempfile.TemporaryDirectory(prefix="chromium", ignore_cleanup_errors=True)
        argv = [PROGRAM, *FLAGS, f"--user-data-dir={self._profile.name}", "about:blank"]
        self._log = Path(self._profile.name) / "log"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(argv, stdout=log, stderr=log, start_new_session=True)
        self._socket = connect(self._address(), max_size=None, proxy=None)
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    _session: dict[str, str] = {}

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_) -> None:
        try:
            self._session = {}
            self.call("Browser.close")
            self._process.wait(timeout=30)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._profile.cleanup()

    def _address(self) -> str:
        end = time.monotonic() + 60
        while not (found := re.search(r"ws://\S+", self._log.read_text())):
            assert time.monotonic() < end and self._process.poll() is None, self._log.read_text()
            time.sleep(0.1)
        return found[0]

    def call(self, method: str, **parameters):
        """Call a method of the protocol and return its result."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters, **self._session}
        self._socket.send(json.dumps(message))
        while (answer := json.loads(self._socket.recv(timeout=60))).get("id") != number:
            self._note(answer)
        assert "error" not in answer, (method, answer["error"])
        return answer["result"]

    def _note(self, event: dict) -> None:
        said = event.get("params", {})
        if event["method"] == "Runtime.exceptionThrown":
            details = said["exceptionDetails"]
            self.errors.append(details.get("exception", {}).get("description", details["text"]))
        elif event["method"] == "Log.entryAdded" and said["entry"]["level"] == "error":
            self.errors.append(said["entry"]["text"])
        elif event["method"] == "Runtime.consoleAPICalled" and said["type"] in ("error", "assert"):
            self.errors.append(str(said["args"]))
        elif event["method"] == "Network.requestWillBeSent":
            url = said["request"]["url"]
            self.requests += [] if url.startswith(("data:", "blob:")) else [url]

    def look(self, width: int, dark: bool = False) -> None:
        """Set the width in pixels, a phone's below 600, and the preferred colours."""
        phone = width < 600
        size = {"width": width, "height": 844 if phone else 900}
        self.call("Emulation.setDeviceMetricsOverride", **size, deviceScaleFactor=1, mobile=phone)
        self.call("Emulation.setTouchEmulationEnabled", enabled=phone)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def open(self, path: Path) -> None:
        """Open a page and draw all of its figures that are not folded away."""
        self.call("Page.navigate", url=path.resolve().as_uri())
        self.wait("document.readyState === 'complete'")
        self.draw()

    def draw(self) -> None:
        """Draw every figure that is not folded away, as before printing."""
        self.value("dispatchEvent(new Event('beforeprint'))")

    def value(self, expression: str):
        """Evaluate an expression in the page and return its value."""
        wanted = {"expression": expression, "awaitPromise": True, "returnByValue": True}
        answer = self.call("Runtime.evaluate", **wanted)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, expression: str) -> None:
        """Wait until an expression is true in the page."""
        end = time.monotonic() + 60
        while not self.value(expression):
            assert time.monotonic() < end, f"not within a minute: {expression}"
            time.sleep(0.1)

    def overflows(self) -> list[str]:
        """Return what reaches beyond the page, or is squeezed."""
        return self.value(OVERFLOWS)

    def screenshot(self, path: Path) -> None:
        """Save a picture of the whole page."""
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))
