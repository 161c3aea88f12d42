"""A headless Chromium that tests drive through its DevTools protocol, over two pipes."""

import base64
import fcntl
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
PROGRAM = next((path for path in map(shutil.which, NAMES) if path), None)
MISSING = "NO BROWSER: the report was not looked at; install one: apt-get install chromium"

_KEYS = {
    "Enter": (13, "\r"),
    " ": (32, " "),
    "Tab": (9, ""),
    "ArrowRight": (39, ""),
    "End": (35, ""),
}


class Browser:
    """One page of a browser.

    Attributes:
        problems: what it said of errors and warnings on its console so far.
    """

    def __init__(self, profile: Path):
        (read, self._out), (self._in, write) = os.pipe(), os.pipe()
        # Not 3 and 4 themselves.
        ends = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (read, write)]
        os.close(read)
        os.close(write)

        def connect():  # the browser reads commands from 3 and answers to 4
            for fd, end in zip((3, 4), ends):
                os.dup2(end, fd)

        self._process = subprocess.Popen(
            [PROGRAM, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
             "--disable-dev-shm-usage", "--remote-debugging-pipe", f"--user-data-dir={profile}"],
            preexec_fn=connect, close_fds=False, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        for end in ends:
            os.close(end)
        self._answers, self._count, self._session, self._rest = {}, 0, None, b""
        self.problems, self._loaded = [], False
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.requests = []

    def call(self, method, **params):
        """Send a command and wait for its answer."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        self._wait(lambda: self._count in self._answers)
        answer = self._answers.pop(self._count)
        assert "error" not in answer, (method, answer["error"])
        return answer["result"]

    def _wait(self, done, seconds=120):
        end = time.monotonic() + seconds
        while not done():
            assert time.monotonic() < end, "the browser does not answer"
            chunk = os.read(self._in, 1 << 16)
            assert chunk, "the browser is gone"
            *messages, self._rest = (self._rest + chunk).split(b"\0")
            for message in map(json.loads, messages):
                self._take(message)

    def _take(self, message):
        if "id" in message:
            self._answers[message["id"]] = message
            return
        method, params = message["method"], message.get("params", {})
        if method == "Page.loadEventFired":
            self._loaded = True
        elif method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.problems.append(params["exceptionDetails"])
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning"):
            self.problems.append(params["args"])
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.problems.append(params["entry"])

    def open(self, path: Path):
        """Load a file from the disk."""
        self._loaded = False
        self.call("Page.navigate", url=path.resolve().as_uri())
        self._wait(lambda: self._loaded)

    def size(self, width, height=900, phone=False):
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=phone,
        )  # fmt: skip
        self.frame()

    def prefer(self, scheme):
        """What the system prefers: light or dark."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", features=features)
        self.frame()

    def frame(self):
        """Wait until the page is drawn again: only then is it told what changed around it."""
        self.js("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def js(self, expression):
        """The value of an expression in the page."""
        answer = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def click(self, selector, x=0.5, y=0.5):
        """A real click on a place of an element, which is scrolled into view."""
        box = self.js(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            "e.scrollIntoView({block: 'center'}); const b = e.getBoundingClientRect();"
            "return [b.x, b.y, b.width, b.height]; })()"
        )
        at = dict(x=box[0] + x * box[2], y=box[1] + y * box[3])
        for kind in ("mousePressed", "mouseReleased"):
            pressed = dict(button="left", buttons=int(kind == "mousePressed"), clickCount=1)
            self.call("Input.dispatchMouseEvent", type=kind, **at, **pressed)

    def press(self, key):
        """A real key press, on what has the focus."""
        code, text = _KEYS[key]
        common = dict(key=key, code={" ": "Space"}.get(key, key), windowsVirtualKeyCode=code)
        self.call(
            "Input.dispatchKeyEvent", type="keyDown", **common, **({"text": text} if text else {})
        )
        self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    def screenshot(self, path: Path):
        data = self.call("Page.captureScreenshot")["data"]
        path.write_bytes(base64.b64decode(data))

    def pdf(self) -> bytes:
        """The page as it is printed."""
        return base64.b64decode(self.call("Page.printToPDF", printBackground=False)["data"])

    def close(self):
        self._process.kill()
        self._process.wait()
        os.close(self._in)
        os.close(self._out)
