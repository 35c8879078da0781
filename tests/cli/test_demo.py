"""The first thing a newcomer runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.timeout(240)
def test_the_demo_shows_what_it_promises(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "cli", "demo", "--out", str(tmp_path / "demo")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "demo" / "report-1" / "summary.json").read_text())
    rows = {(row["defense"], row["kind"]): row for row in summary["rows"]}
    assert all(not row["errors"] and row["images"] == 200 for row in rows.values())
    assert rows["none", "pgd20"]["accuracy"] < 0.20
    assert rows["rmc", "pgd20"]["accuracy"] - rows["none", "pgd20"]["accuracy"] >= 0.50
    assert abs(rows["rmc", "clean"]["accuracy"] - rows["none", "clean"]["accuracy"]) <= 0.05
    assert "report.html" in done.stdout
    page = (tmp_path / "demo" / "report-1" / "report.html").read_text()
    assert "<script" not in page
    assert 'src="http' not in page
    assert page.count("<figure") == 12
