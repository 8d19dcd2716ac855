"""The report in a real browser: no sideways scrolling at any width, no text cut off by its plot, nothing loaded."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess

import pytest
import torch

from calm_fast.benchmarks import report
from calm_fast.benchmarks.registry import REGISTRY, cases
from calm_fast.benchmarks.timing import Ceilings

CPU = torch.device("cpu")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--virtual-time-budget=5000", "--dump-dom",
)  # fmt: skip
WIDTHS = (320, 390, 768, 1000, 1280)
# the page in a frame of each width: a window cannot be as narrow as a phone
PROBE = """<body>FRAMES<pre id="found"></pre><script>
function look(frame) {
  const page = frame.contentDocument, view = page.documentElement, cut = [];
  for (const plot of page.querySelectorAll("svg")) {
    const box = plot.getBoundingClientRect();
    for (const text of plot.querySelectorAll("text")) {
      const at = text.getBoundingClientRect();
      if (at.left < box.left - 1 || at.right > box.right + 1 || at.top < box.top - 1 || at.bottom > box.bottom + 1)
        cut.push(plot.getAttribute("aria-label") + ": " + text.textContent);
    }
  }
  const loaded = frame.contentWindow.performance.getEntriesByType("resource").map(e => e.name);
  return {needs: view.scrollWidth, has: view.clientWidth, plots: page.querySelectorAll("svg").length, cut, loaded};
}
addEventListener("load", () => {
  found.textContent = JSON.stringify(Array.from(document.querySelectorAll("iframe"), look));
});
</script></body>"""


def rows_of(case):
    """Make up times for every contestant, far enough apart to fill the plots."""
    return [
        {
            "op": case.op, "case": case.name, "impl": c.name, "device": "cpu, 1 thread",
            "dtype": str(case.dtype).removeprefix("torch."), "shape": dict(case.shape), "ms": 5.0 + 7 * i,
            "p20": 4.0 + 7 * i, "p80": 9.0 + 7 * i, "peak_bytes": (i + 1) * 2**17, "flops": case.flops,
            "bytes": case.bytes, "floor_ms": 3.0, "error": 1e-7, "versions": {"torch": "2"}, "commit": "abc",
            "date": "2026-01-01T00:00:00+00:00", "ours": c.ours, "bound": 2e-7, "failure": None, "rounds": 5,
        }
        for i, c in enumerate(case.contestants)
    ]  # fmt: skip


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome here")
def test_report_in_a_browser(tmp_path):
    chosen = [c for op in REGISTRY for c in cases(op, CPU, "quick")]
    rows = [row for c in chosen for row in rows_of(c)]
    report.write(tmp_path, rows, {c.name: Ceilings(1e11, 2e10) for c in chosen}, chosen)
    page = html.escape((tmp_path / "report.html").read_text(encoding="utf-8"), quote=True)
    frames = "".join(f'<iframe srcdoc="{page}" width="{width}" height="800"></iframe>' for width in WIDTHS)
    (tmp_path / "probe.html").write_text(PROBE.replace("FRAMES", frames), encoding="utf-8")
    command = [BROWSER, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", (tmp_path / "probe.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    (found,) = re.findall(r'<pre id="found">(.+?)</pre>', done.stdout[-100_000:], re.DOTALL) or [done.stderr]
    seen = json.loads(html.unescape(found))
    for width, frame in zip(WIDTHS, seen, strict=True):
        assert width - 20 <= frame["has"] <= width and frame["plots"] >= 8
        assert frame["needs"] <= frame["has"], f"{width} px: the page is {frame['needs']} px wide"
        assert frame["cut"] == [] and frame["loaded"] == []
