"""A headless Chromium and what a user does with it, over the DevTools protocol; nothing but `websockets` is needed.

Protocol: https://chromedevtools.github.io/devtools-protocol/.
"""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",  # /dev/shm of a container is small
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--force-color-profile=srgb",
    "--remote-debugging-port=0",  # any free one; it says which
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost",
)
TIMEOUT = 60.0  # seconds until a wait has failed; a machine may be slow
KEYS = {"Enter": ("\r", 13), "Escape": ("", 27), "Tab": ("", 9), "Home": ("", 36)}  # the text and the code of each
SHIFT = 8


def find_chromium() -> str | None:
    """The path of an installed Chromium or Chrome."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return next(filter(None, map(shutil.which, names)), None)


class BrowserError(Exception):
    """The browser refused a command, or a script in the page failed."""


class Page:
    """One tab. `requests` holds the URL of everything that it has asked the network for, WebSockets included."""

    def __init__(self, connection: ClientConnection, session: str) -> None:
        self._connection, self._session = connection, session
        self._calls = 0
        self._events: list[dict[str, Any]] = []
        self.requests: list[str] = []
        self.failures: list[str] = []
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command; return its result."""
        self._calls += 1
        message = {"id": self._calls, "method": method, "params": params, "sessionId": self._session}
        self._connection.send(json.dumps(message))
        while True:
            answer = self._receive()
            if answer.get("id") == self._calls:
                if "error" in answer:
                    raise BrowserError(f"{method}: {answer['error']['message']}")
                return dict(answer["result"])

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression; a promise is waited for."""
        answer = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            raise BrowserError(f"{expression}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def wait_for(self, condition: str) -> Any:
        """Return the JavaScript expression's value once it is truthy."""
        look = (
            f"const look = () => {{ const found = {condition}; found ? done(found) : setTimeout(look, 5); }}; look();"
        )
        return self.evaluate(f"new Promise((done) => {{ {look} }})")

    def open(self, url: str) -> None:
        """Go to a URL and wait until it has loaded."""
        self._navigate("Page.navigate", url=url)

    def reload(self) -> None:
        """As the user's F5."""
        self._navigate("Page.reload")

    def type(self, text: str) -> None:
        """Type into what has the focus."""
        self.call("Input.insertText", text=text)

    def press(self, key: str, *, shift: bool = False) -> None:
        """Press and release a key of KEYS."""
        text, code = KEYS[key]
        which: dict[str, Any] = {"key": key, "code": key, "windowsVirtualKeyCode": code, "modifiers": SHIFT * shift}
        self.call("Input.dispatchKeyEvent", type="keyDown", **which, **({"text": text} if text else {}))
        self.call("Input.dispatchKeyEvent", type="keyUp", **which)

    def click(self, selector: str) -> None:
        """Click in the middle of an element, as a mouse does."""
        box = f"document.querySelector({json.dumps(selector)}).getBoundingClientRect()"
        x, y = self.evaluate(f"(({{x, y, width, height}}) => [x + width / 2, y + height / 2])({box})")
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def resize(self, width: int, height: int, *, scale: float = 1.0, phone: bool = False) -> None:
        """Be a window, or a phone's screen, of this many CSS pixels."""
        size = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": phone}
        self.call("Emulation.setDeviceMetricsOverride", **size)

    def prefer_color_scheme(self, scheme: str) -> None:
        """Be a browser whose user prefers "light" or "dark"."""
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def screenshot(self, path: Path) -> None:
        """Write what is seen as a PNG."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def _navigate(self, method: str, **params: Any) -> None:
        self._events.clear()
        self.call(method, **params)
        while not any(event["method"] == "Page.loadEventFired" for event in self._events):
            self._receive()

    def _receive(self) -> dict[str, Any]:
        message: dict[str, Any] = json.loads(self._connection.recv(timeout=TIMEOUT))
        if "method" in message:
            self._events.append(message)
            self._note(message["method"], message["params"])
        return message

    def _note(self, method: str, params: dict[str, Any]) -> None:
        if method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method == "Network.webSocketCreated":
            self.requests.append(params["url"])
        elif method == "Runtime.exceptionThrown":
            self.failures.append(str(params["exceptionDetails"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.failures.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")


class Browser:
    """A running Chromium with a profile of its own. Each page has cookies and storage to itself."""

    def __init__(self, connection: ClientConnection) -> None:
        self._connection = connection

    @contextmanager
    def page(self) -> Iterator[Page]:
        """A fresh tab, as if in a private window."""
        context = self._call("Target.createBrowserContext")["browserContextId"]
        target = self._call("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        try:
            yield Page(self._connection, session)
        finally:
            self._call("Target.disposeBrowserContext", browserContextId=context)

    def _call(self, method: str, **params: Any) -> dict[str, Any]:
        self._connection.send(json.dumps({"id": 0, "method": method, "params": params}))
        while True:
            answer = json.loads(self._connection.recv(timeout=TIMEOUT))
            if answer.get("id") == 0:
                if "error" in answer:
                    raise BrowserError(f"{method}: {answer['error']['message']}")
                return dict(answer["result"])


@contextmanager
def chromium(executable: str) -> Iterator[Browser]:
    """Start Chromium; end it, and remove its profile, on the way out."""
    with tempfile.TemporaryDirectory(prefix="inferneo-chromium-", ignore_cleanup_errors=True) as profile:
        command = [executable, *FLAGS, f"--user-data-dir={profile}"]
        with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
            try:
                assert process.stderr is not None
                said = []
                for line in process.stderr:
                    said.append(line)
                    if line.startswith("DevTools listening on "):
                        break
                else:
                    raise BrowserError(f"{executable} ended before it listened:\n{''.join(said)}")
                threading.Thread(target=process.stderr.read, daemon=True).start()  # a full pipe would stop it
                with connect(line.split()[-1], max_size=None, ping_interval=None) as connection:
                    yield Browser(connection)
            finally:
                process.kill()
