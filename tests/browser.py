"""A page in a real browser: it stands in a frame of some width, and a script next to the frame measures it."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


def look(shown: Sequence[tuple[str, int]], folder: Path, measured: str) -> list[dict[str, Any]]:
    """Measure pages, and skip where there is no browser.

    Args:
        shown: HTML, and the width in pixels of the frame that it stands in.
        folder: where the browser may write.
        measured: fields of a JavaScript object; `inside` is the page's document, `size` its root element, and `width`
            that of its frame.
    """
    if CHROMIUM is None:
        pytest.skip("no chromium, chromium-browser, google-chrome or chrome on the path")
    sources = json.dumps(shown).replace("<", "\\u003c")
    (folder / "frame.html").write_text(
        f"""<!doctype html><title>fine</title><p></p><script>
        const seen = [];
        const shown = {sources};
        const right = (one) => one.getBoundingClientRect().right;
        shown.forEach(([source, width], place) => {{
          const frame = document.createElement("iframe");
          frame.style = `border:0;width:${{width}}px;height:900px`;
          frame.onload = () => {{
            const inside = frame.contentDocument;
            const size = inside.documentElement;
            seen[place] = {{
              fits: size.scrollWidth <= width, title: inside.title, own: document.title,
              scripts: inside.querySelectorAll("script, img").length, {measured} }};
            if (seen.filter(Boolean).length == shown.length)
              document.querySelector("p").textContent = JSON.stringify(seen);
          }};
          frame.srcdoc = source;
          document.body.append(frame);
        }});
        </script>"""
    )
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += [f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=5000", "--window-size=1300,1000"]
    done = subprocess.run(
        [*command, "--dump-dom", f"file://{folder / 'frame.html'}"], capture_output=True, text=True, timeout=120
    )
    (said,) = re.findall(r"<p>(.*?)</p>", done.stdout)
    seen: list[dict[str, Any]] = json.loads(html.unescape(said))
    return seen
