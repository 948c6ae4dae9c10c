"""The report in a real browser, at the width of a desk and of a phone, light and dark (`make test-
browser` fetches what it needs).
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from serve_bench import write_report
from tests import ROOT, scenarios
from tests.serve_bench.tell.runs import make_run, recipe

ENVIRONMENT = ROOT / ".venvs" / "browser"
CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)

pytestmark = [
    pytest.mark.skipif(
        CHROMIUM is None, reason="no Chromium on this machine; run: apt-get install chromium"
    ),
    pytest.mark.skipif(
        not (ENVIRONMENT / "node_modules" / "axe-core").is_dir(),
        reason="puppeteer and axe are not here; run: make test-browser",
    ),
]


def look(page: Path, **more: Any) -> list[dict[str, Any]]:
    job = {
        "chromium": CHROMIUM,
        "page": str(page.resolve()),
        "widths": [1280, 390],
        "shots": None,
        **more,
    }
    done = subprocess.run(
        ["node", str(ROOT / "tests/clients/page.mjs")],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        cwd=ENVIRONMENT,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_the_report_is_sound_at_both_widths_and_in_both_schemes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = {
        "offline": scenarios.offline(),
        "cold": scenarios.cold(),
        "server": scenarios.server(),
    }
    monkeypatch.setattr("serve_bench.tasks.language.scenarios.summary", lambda *_: measured)
    chosen = recipe()
    report = write_report(run=make_run(tmp_path, chosen), recipe=chosen)
    found = look(report.html, pdf=str(tmp_path / "report.pdf"))
    assert [(view["scheme"], view["width"]) for view in found] == [
        ("light", 1280),
        ("light", 390),
        ("dark", 1280),
        ("dark", 390),
    ]
    for view in found:
        where = f"{view['scheme']}, {view['width']} px"
        assert view["errors"] == [], where
        assert view["requests"] == [], where
        assert view["overflow"] <= 0, where
        assert view["violations"] == [], where
        assert view["sorted"]["up"] == sorted(view["sorted"]["up"]), where
        assert view["sorted"]["down"] == sorted(view["sorted"]["up"], reverse=True), where
        assert view["sorted"]["state"] == "descending", where
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF")


def test_the_look_finds_what_is_wrong(tmp_path: Path) -> None:
    page = tmp_path / "bad.html"
    page.write_text(
        "<html><body><div style='width:2000px'>x</div><svg role='img'></svg><script>throw "
        "Error('no')</script>"
    )
    view = look(page, widths=[390])[0]
    assert view["overflow"] > 0
    assert any("no" in error for error in view["errors"])
    assert any(violation.startswith("svg-img-alt") for violation in view["violations"])
