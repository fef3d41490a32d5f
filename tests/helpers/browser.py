"""A real browser for tests: headless Chromium through chromedriver's own protocol (W3C WebDriver), no further library.

    with browser(language="ja") as page:
        page.open(url, width=360)
        page.type("#text", "春の夜")
        page.click("#classify")
        page.until("return document.querySelectorAll('article').length == 3")
        page.screenshot(path)

Debian has both: apt-get install chromium chromium-driver.
"""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

DRIVER = shutil.which("chromedriver")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
MISSING = "no chromedriver and chromium here" if DRIVER is None or CHROMIUM is None else None


class Page:
    def __init__(self, session: str, language: str):
        self.session, self.language = session, language

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.session + path, data, {"Content-Type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(json.load(error)["value"]["message"]) from None

    def cdp(self, command: str, **parameters: Any) -> Any:
        return self.call("POST", "/goog/cdp/execute", {"cmd": command, "params": parameters})

    def open(self, url: str, *, width: int = 1000, height: int = 800, dark: bool = False) -> None:
        """As a window (or a phone's screen) of this many CSS pixels."""
        self.cdp(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=2, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.cdp("Emulation.setEmulatedMedia", features=[scheme])
        self.call("POST", "/url", {"url": url})

    def run(self, script: str, *arguments: Any) -> Any:
        return self.call("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def until(self, script: str, seconds: float = 20) -> None:
        """Until `script` returns something true."""
        end = time.monotonic() + seconds
        while not self.run(script):
            assert time.monotonic() < end, f"not within {seconds} s: {script}"
            time.sleep(0.05)

    def click(self, selector: str) -> None:
        """As a finger would: where the element is, if nothing lies over it."""
        self.call("POST", f"/element/{self._find(selector)}/click", {})

    def type(self, selector: str, text: str) -> None:
        self.call("POST", f"/element/{self._find(selector)}/value", {"text": text})

    def text(self, selector: str) -> str:
        return str(self.call("GET", f"/element/{self._find(selector)}/text"))

    def _find(self, selector: str) -> str:
        found = self.call("POST", "/element", {"using": "css selector", "value": selector})
        return str(next(iter(found.values())))

    def screenshot(self, path: Path) -> None:
        """The whole page, however long."""
        picture = self.cdp("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(picture))

    def complaints(self) -> list[str]:
        """What the browser's console holds: errors of scripts, blocked or failed requests."""
        return [entry["message"] for entry in self.call("POST", "/se/log", {"type": "browser"})]


@contextmanager
def browser(language: str = "en") -> Iterator[Page]:
    assert DRIVER is not None
    with tempfile.TemporaryDirectory() as profile:
        driver = subprocess.Popen([DRIVER, "--port=0"], stdout=subprocess.PIPE, text=True)
        try:
            assert driver.stdout is not None
            line = next(line for line in driver.stdout if "started successfully on port" in line)
            driver_url = f"http://127.0.0.1:{int(line.strip().rstrip('.').rsplit(' ', 1)[-1])}"
            # as root there is no sandbox to be had; only pages of our own are shown
            switches = f"--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --lang={language} --user-data-dir={profile}"
            options = {
                "binary": CHROMIUM,
                "args": switches.split(),
                "prefs": {"intl.accept_languages": language},
            }
            wanted = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
            page = Page(driver_url, language)
            page.session = (
                f"{driver_url}/session/"
                + page.call("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]
            )
            try:
                yield page
            finally:
                page.call("DELETE", "")
        finally:
            driver.terminate()
            driver.wait(timeout=10)
            driver.stdout.close()
