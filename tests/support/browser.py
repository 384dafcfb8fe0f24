"""HTML pages in a real browser, checked after their scripts have run."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

SWITCHES = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --enable-logging=stderr --dump-dom"
)


def open_page(page: str, folder: Path, afterwards: str = "", real_time: bool = False) -> tuple[str, list[str]]:
    """Open a page, and run a test's script under the page's security policy.

    Args:
        page: the page's HTML.
        folder: the folder for the page and the browser's profile.
        afterwards: the test's JavaScript, at the end of the page.
        real_time: use the real clock, and end when the page is loaded; otherwise timers fire at once.

    Returns:
        The document without its scripts, and a line for each error or violation of the page's policy.
    """
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no browser; install Debian's chromium")
    nonce = re.search(r"'nonce-([^']+)'", page)[1]
    file = folder / "page.html"
    script = f'<script nonce="{nonce}">{afterwards}</script></body>'
    file.write_text(script.join(page.rsplit("</body>", 1)) if afterwards else page, encoding="utf-8")
    clock = [] if real_time else ["--virtual-time-budget=5000"]
    command = [browser, *SWITCHES.split(), *clock, f"--user-data-dir={folder / 'browser'}", file.as_uri()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    complaints = [line for line in result.stderr.splitlines() if ":CONSOLE" in line]
    return re.sub(r"<script.*?</script>", "", result.stdout, flags=re.DOTALL), complaints
