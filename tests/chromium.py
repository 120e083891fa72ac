"""A headless Chromium spoken to over pipes by its DevTools protocol: no port, no driver, no package."""

import base64
import json
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from fcntl import F_DUPFD_CLOEXEC, fcntl
from pathlib import Path
from select import select
from typing import Any

import pytest

VARIABLE = "QECTOMY_CHROMIUM"
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run")
WAIT = 60  # seconds for an answer, on a machine that is busy


def find_chromium() -> str:
    """Return the path of a Chromium. Without one the test is skipped; a QECTOMY_CHROMIUM that is none fails it."""
    told = os.environ.get(VARIABLE)
    if told:
        if not shutil.which(told):
            pytest.fail(f"{VARIABLE}={told} is no program that can be run")
        return told
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no Chromium here; install one, or set {VARIABLE} to its path")
    return found


class Browser:
    """One page of a running Chromium."""

    def __init__(self, reading: int, writing: int) -> None:
        self.reading, self.writing = reading, writing
        self.rest, self.number, self.session = b"", 0, ""
        self.problems: list[str] = []  # what the page logged: errors, and what its policy refused
        self.requests: list[str] = []

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.writing, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            self._note(answer)
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self.rest:
            assert select([self.reading], [], [], WAIT)[0], "Chromium does not answer"
            piece = os.read(self.reading, 1 << 16)
            assert piece, "Chromium ended"
            self.rest += piece
        message, _, self.rest = self.rest.partition(b"\0")
        return json.loads(message)

    def _note(self, event: dict[str, Any]) -> None:
        method, told = event.get("method"), event.get("params", {})
        if method == "Runtime.exceptionThrown" or method == "Runtime.consoleAPICalled":
            self.problems.append(json.dumps(told)[:500])
        elif method == "Log.entryAdded":
            self.problems.append(told["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            self.requests.append(told["request"]["url"])

    def start(self) -> None:
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def open(self, file: Path, *, width: int = 1000, dark: bool = False, media: str = "") -> None:
        """Show a file at a width; narrow ones as a phone would."""
        phone = width < 600
        size = dict(width=width, height=800, deviceScaleFactor=2 if phone else 1, mobile=phone)
        self.call("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", media=media, features=[scheme])
        self.problems.clear()
        self.requests.clear()
        self.call("Page.navigate", url=file.absolute().as_uri())
        while self.evaluate("document.readyState") != "complete":
            pass

    def evaluate(self, script: str) -> Any:
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def screenshot(self, file: Path) -> None:
        picture = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(picture["data"]))

    def pdf(self) -> bytes:
        return base64.b64decode(self.call("Page.printToPDF", preferCSSPageSize=True)["data"])


def _pipe() -> tuple[int, int]:
    """A pipe whose ends are clear of 3 and 4, which Chromium reads and writes."""
    reading, writing = os.pipe()
    moved = fcntl(reading, F_DUPFD_CLOEXEC, 10), fcntl(writing, F_DUPFD_CLOEXEC, 10)
    os.close(reading)
    os.close(writing)
    return moved


@contextmanager
def browser(path: str) -> Iterator[Browser]:
    """Start a Chromium and yield a page of it."""
    profile = tempfile.mkdtemp(prefix="chromium-")
    (theirs_in, ours_out), (ours_in, theirs_out) = _pipe(), _pipe()
    log = os.path.join(profile, "log")
    child = os.posix_spawnp(
        path,
        [path, *FLAGS, "--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank"],
        {**os.environ, "DBUS_SESSION_BUS_ADDRESS": "disabled:"},
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 1, log, os.O_WRONLY | os.O_CREAT, 0o600),
            (os.POSIX_SPAWN_DUP2, 1, 2),
            (os.POSIX_SPAWN_DUP2, theirs_in, 3),
            (os.POSIX_SPAWN_DUP2, theirs_out, 4),
        ],
        setsid=True,
    )
    os.close(theirs_in)
    os.close(theirs_out)
    try:
        page = Browser(ours_in, ours_out)
        try:
            page.start()
        except (AssertionError, OSError) as error:
            told = Path(log).read_text(errors="replace")[-2000:] if os.path.exists(log) else ""
            pytest.fail(f"{path} does not work as a headless Chromium: {error}\n{told}")
        yield page
    finally:
        os.close(ours_out)
        os.close(ours_in)
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
        shutil.rmtree(profile, ignore_errors=True)
