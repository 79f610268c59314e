"""Web pages in a browser, for tests of what their scripts do."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
needs_browser = pytest.mark.skipif(
    BROWSER is None, reason=f"none of {', '.join(BROWSERS)} is installed"
)


def browse(page: Path, *options: str) -> str:
    """Open a page without a window, 1280 px wide; returns what the browser prints."""
    assert BROWSER
    profile = page.parent / "profile"
    fixed = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
    fixed += ["--disable-background-networking", "--no-first-run", "--window-size=1280,1600"]
    words = [BROWSER, *fixed, *options, page.as_uri()]
    return subprocess.run(words, check=True, capture_output=True, text=True, timeout=120).stdout


def title_after(page: Path, script: str) -> str:
    """The title of a page after a script has run at its end, which may set the title."""
    scripted = page.with_name("scripted.html")
    scripted.write_text(page.read_text().replace("</body>", f"<script>{script}</script></body>"))
    text = browse(scripted, "--dump-dom")
    return text.partition("<title>")[2].partition("</title>")[0]
