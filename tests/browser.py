"""A headless Chromium, driven over its debugging pipe: enough to open pages, ask them questions and take pictures.

Chromium started with `--remote-debugging-pipe` reads JSON messages that end in a zero byte from descriptor 3 and
answers on descriptor 4, so that no driver program and no port is needed.
"""

import base64
import json
import os
import queue
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Self

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ANSWER_S = 30.0
_POLL_S = 0.05


class PageError(Exception):
    """The page is not as expected, or its script raised."""


class Browser:
    """One browser with one tab; use it as a context.

    Args:
        width, height: of the page in pixels; pictures have this size, unless asked for more.
    """

    def __init__(self, width: int = 1600, height: int = 1000) -> None:
        self._size = {"width": width, "height": height}

    def __enter__(self) -> Self:
        assert CHROMIUM is not None
        self._profile = tempfile.mkdtemp(prefix="ccdist-browser-")
        from_browser, answers = os.pipe()
        questions, to_browser = os.pipe()
        options = [
            "--headless=new",
            "--remote-debugging-pipe",
            "--no-sandbox",  # it refuses to run as root with one, and only pages of this project are opened
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--disable-background-networking",
            "--disable-component-update",
            "--no-first-run",
            # With a mouse, as people have: without one charts show their buttons all the time.
            "--blink-settings=primaryHoverType=2,availableHoverTypes=2,primaryPointerType=4,availablePointerTypes=4",
            "--hide-scrollbars",
            f"--user-data-dir={self._profile}",
            "about:blank",
        ]
        # The shell puts the pipes where Chromium looks for them, whatever their numbers are here.
        self._process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{questions} 4>&{answers}', "chromium", CHROMIUM, *options],
            pass_fds=(questions, answers),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(questions)
        os.close(answers)
        self._out = os.fdopen(to_browser, "wb", buffering=0)
        self._in = os.fdopen(from_browser, "rb")
        self._number, self._session = 0, ""
        self._answers: queue.Queue[dict[str, Any]] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()
        try:
            target = self._ask("Target.createTarget", url="about:blank")["targetId"]
            self._session = self._ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
            self._ask("Page.enable")
            self._ask("Emulation.setDeviceMetricsOverride", **self._size, deviceScaleFactor=1, mobile=False)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._out.close()
        shutil.rmtree(self._profile, ignore_errors=True)  # its helpers may still write for a moment

    def open(self, url: str) -> None:
        """Go to an address; what the page loads afterwards is waited for with `wait`."""
        # Addresses that differ after `#` only would not load anything anew.
        self._ask("Page.navigate", url="about:blank")
        self._ask("Page.navigate", url=url)

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression on the page; one that JSON can hold, so no element."""
        answer = self._ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise PageError(answer["exceptionDetails"].get("exception", {}).get("description", str(answer)))
        return answer["result"].get("value")

    def wait(self, expression: str, timeout_s: float = 20.0) -> Any:
        """The value of an expression as soon as it is true; it may fail until then."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                if value := self.evaluate(expression):
                    return value
                problem = ""
            except PageError as error:
                problem = str(error)
            if time.monotonic() > deadline:
                text = self.evaluate("document.body.innerText")
                raise PageError(
                    f"not true within {timeout_s:g} s: {expression} {problem}\nthe page says: {text[:2000]}"
                )
            time.sleep(_POLL_S)

    def wait_for_text(self, text: str, timeout_s: float = 20.0) -> None:
        self.wait(f"document.body.innerText.includes({json.dumps(text)})", timeout_s)

    def click(self, text: str) -> None:
        """Click the smallest element that shows this text."""
        self.wait(
            f"""(() => {{
                const found = [...document.querySelectorAll("button, a, [role=button], span, div")]
                    .filter(each => each.innerText?.trim() === {json.dumps(text)} && each.offsetParent)
                    .sort((one, other) => one.innerText.length - other.innerText.length).at(-1);
                found?.click();
                return Boolean(found);
            }})()"""
        )

    def screenshot(self, path: Path) -> Path:
        """A picture of what the tab shows, as PNG."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(self._ask("Page.captureScreenshot", format="png")["data"]))
        return path

    def _ask(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        self._out.write(json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + ANSWER_S
        while (remaining := deadline - time.monotonic()) > 0:
            try:
                answer = self._answers.get(timeout=remaining)
            except queue.Empty:
                break
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise PageError(f"{method}: {answer['error']['message']}")
                result: dict[str, Any] = answer["result"]
                return result
        raise PageError(f"the browser did not answer {method} within {ANSWER_S:g} s")

    def _listen(self) -> None:
        with self._in:
            waiting = b""
            while block := os.read(self._in.fileno(), 1 << 16):
                *messages, waiting = (waiting + block).split(b"\0")
                for message in messages:
                    self._answers.put(json.loads(message))
