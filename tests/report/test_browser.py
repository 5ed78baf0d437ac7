"""The page in a real headless browser: no console message, no request, no sideways scrolling on a phone."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from dwindle.report import RunSummary, write_page

BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--enable-logging=stderr",
    "--v=0",
]
PROBE = """
<script>
addEventListener('load', () => {
  const root = document.documentElement;
  console.log('PROBE width=' + root.scrollWidth + ' view=' + innerWidth + ' requests=' +
    performance.getEntriesByType('resource').length + ' heading=' + document.querySelector('h1').textContent);
});
</script>
"""

pytestmark = pytest.mark.skipif(
    BROWSER is None, reason="no chromium on this machine (apt-get install chromium)"
)


@pytest.mark.parametrize("width", [1200, 500])
def test_page_in_a_browser(tmp_path: Path, summary: RunSummary, width: int) -> None:
    page = tmp_path / "report.html"
    write_page(summary, page)
    # The page itself holds no script; this one reads what the browser made of it.
    page.write_text(page.read_text().replace("</body>", PROBE + "</body>"))
    assert BROWSER is not None
    command = [BROWSER, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},1000"]
    picture = tmp_path / "page.png"
    done = subprocess.run(
        [*command, f"--screenshot={picture}", page.as_uri()], capture_output=True, text=True, timeout=90
    )
    messages = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert len(messages) == 1, messages
    found = re.search(r"PROBE width=(\d+) view=(\d+) requests=(\d+) heading=(.*?)\"", messages[0])
    assert found is not None
    assert int(found[1]) <= int(found[2])
    assert found[3] == "0"
    assert found[4] == "A <test> & more"
    assert picture.stat().st_size > 20_000
