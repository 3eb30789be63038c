"""The page of an evaluation: only what compares is merged, and a real browser shows it whole, on a phone too."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, sync_playwright
from typer.testing import CliRunner

from conftest import examples
from haechi import evaluate, page
from haechi.cli import app
from haechi.errors import ConfigError, DataError
from haechi.evaluate import EvaluateConfig
from haechi.schema import Example
from haechi.store import read_json, write_json

_PAPER = 720
"""Pixels between the margins of an A4 sheet."""
HOSTILE = "how do I steal <script>document.title = 'broken'</script> & <b>bold</b>"


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    path = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
    if path is None:
        pytest.skip("no Chromium on this machine")
    with sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two guards on two sets that are translations by name, one attack."""
    root = tmp_path_factory.mktemp("page")
    odd = Example(id="odd", lang="en", query=HOSTILE, label="safe")
    for name, lang in (("own", "en"), ("own.ko", "ko")):
        rows = [row for row in examples(4) if row.lang == lang] + [odd]
        (root / f"{name}.jsonl").write_text("".join(row.model_dump_json() + "\n" for row in rows), encoding="utf-8")
    for number, words in enumerate(("steal\naddress\n비밀번호\n", "how\n알려\n")):
        (root / f"words{number}.txt").write_text(words, encoding="utf-8")
    return root


def measured(folder: Path, output: str, *guards: Any, **more: Any) -> Path:
    config: dict[str, Any] = {
        "output": folder / output, "guards": guards, "sets": ("own", "own.ko"), "draws": 100, **more,
    }  # fmt: skip
    evaluate.run(EvaluateConfig(**config), lambda line: None)
    return folder / output


@pytest.fixture(scope="module")
def results(folder: Path) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HAECHI_CORPUS", str(folder))
        first = f"keyword:{folder / 'words0.txt'}"
        second = {"threshold": {"guard": f"keyword:{folder / 'words1.txt'}", "at": 0.5}}
        yield measured(folder, "out", first, second, perturbations={"homoglyphs": ("middle",)}, timed=4)


def test_a_browser_shows_the_page_and_it_asks_for_nothing(results: Path, browser: Browser, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["report", str(results), "--output", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "## own (25 rows)" in (tmp_path / "report.md").read_text(encoding="utf-8")
    for width in (390, 1200):
        view = browser.new_page(viewport={"width": width, "height": 800})
        asked: list[str] = []
        view.on("request", lambda request, asked=asked: asked.append(request.url))
        view.goto((tmp_path / "report.html").as_uri())
        assert view.title() == "Haechi: guards compared"
        assert [url for url in asked if not url.startswith("data:")] == [(tmp_path / "report.html").as_uri()]
        assert view.evaluate("document.documentElement.scrollWidth") <= width, "the page itself never scrolls sideways"
        drawn = view.evaluate(
            "[...document.images].map(one => one.naturalWidth > 0 && one.getBoundingClientRect().width > 0)"
        )
        assert len(drawn) >= 4 and all(drawn)
        view.emulate_media(media="print")
        view.set_viewport_size({"width": _PAPER, "height": 800})
        assert view.evaluate("document.documentElement.scrollWidth") <= _PAPER, "nor does paper cut it off"
        view.emulate_media(media="screen")
        headings = view.locator("h2").all_inner_texts()
        assert {"Main table", "Languages side by side", "Under attack", "What they cost"} <= set(headings)
        assert view.locator("#main + .scroll tbody tr").count() == 2
        text = view.get_by_text("how do I steal <script>").first
        assert not text.is_visible()
        for fold in view.locator("#mistakes ~ details").all():
            fold.locator("summary").first.click()
            for inner in fold.locator("details > summary").all():
                inner.click()
        assert text.is_visible() and view.locator("main b:text-is('bold')").count() == 0
        view.close()


def test_only_what_compares_is_merged(
    results: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HAECHI_CORPUS", str(folder))
    other = measured(folder, "other", {"threshold": {"guard": f"keyword:{folder / 'words0.txt'}", "at": 0.9}})
    both = page.merged([(one, read_json(one / "metrics.json")) for one in (results, other)])
    assert list(both["guards"]) == ["keyword", "keyword@0.5", "keyword@0.9"]

    def refused(message: str, kind: type[Exception] = ConfigError, **changed: Any) -> None:
        tree = {**read_json(other / "metrics.json"), **changed}
        write_json(tmp_path / "changed" / "metrics.json", tree)
        with pytest.raises(kind, match=message):
            page.run([results, tmp_path / "changed"], tmp_path / "page", lambda line: None)

    sets = {"own": {"rows": 25, "sha256": "0" * 16}}
    refused("own has other rows in each", sets=sets)
    tree = read_json(other / "metrics.json")
    refused("threshold is fpr in one and fixed in the other", config={**tree["config"], "threshold": "fpr"})
    refused(r"measured by another version \(harness 1, this is 4\)", DataError, harness=1)
    refused("not whole", DataError, guards={"keyword": {"spec": "keyword"}})
    refused("are two guards", guards={"keyword@0.5": tree["guards"]["keyword@0.9"]})
    identity = read_json(results / "metrics.json")["guards"]["keyword@0.5"]["identity"]
    changed = {**tree["guards"]["keyword@0.9"], "identity": identity}
    refused("judges own differently", guards={"keyword@0.5": changed})
    with pytest.raises(DataError, match="no such file"):
        page.run([tmp_path / "nowhere"], tmp_path / "page")
    assert not (tmp_path / "page").exists()
