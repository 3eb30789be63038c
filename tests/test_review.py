"""The sheet tells nobody whose answer is whose; the key does."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from conftest import REFUSAL, examples
from haechi import review
from haechi.cli import app
from haechi.errors import ConfigError, DataError
from haechi.guards import load_guard
from haechi.guards.slm import load
from haechi.schema import Example


def test_a_sheet_is_blind_and_its_key_opens_it(exported: Path, tmp_path: Path) -> None:
    formula = Example(id="f", lang="en", query="=HYPERLINK(1)", label="unsafe", response=REFUSAL["en"])
    rows = [*examples(), formula]
    source, sheet = tmp_path / "set.jsonl", tmp_path / "sheet.csv"
    source.write_text("".join(row.model_dump_json() + "\n" for row in rows), encoding="utf-8")
    command = ["review", "export", str(source), "--model", str(exported), "--output", str(sheet), "--rows", "40"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    lines = list(csv.DictReader(sheet.read_text(encoding="utf-8-sig").splitlines()))
    key = json.loads((tmp_path / "sheet.csv.key.json").read_text())
    harmful = {row.id: row for row in rows if row.label == "unsafe"}
    assert len(lines) == len(key["rows"]) == len(harmful)
    assert {entry["A"] for entry in key["rows"]} == {"guard", "reference"}
    guard = load(exported)
    for line, entry in zip(lines, key["rows"], strict=True):
        row = harmful[entry["id"]]
        side = "A" if entry["A"] == "reference" else "B"
        assert line[f"answer {side}"] == row.response and line["query"].lstrip("'") == row.query
        assert not line["query"].startswith("=")
        assert line[f"answer {'B' if side == 'A' else 'A'}"] == guard.answer([row.query], force=True)[0].text
    assert "reference" not in sheet.read_text(encoding="utf-8-sig")
    with pytest.raises(ConfigError, match="may hold someone's judgements"):
        review.export(guard, str(source), sheet)


def test_what_cannot_be_reviewed_is_one_line(exported: Path, tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("bomb\n")
    with pytest.raises(ConfigError, match="verdicts only"):
        review.export(load_guard(f"keyword:{tmp_path / 'words.txt'}"), "x", tmp_path / "sheet.csv")
    (tmp_path / "set.jsonl").write_text('{"query": "a", "label": "unsafe"}\n')
    with pytest.raises(DataError, match="no harmful rows with a reference answer"):
        review.export(load(exported), str(tmp_path / "set.jsonl"), tmp_path / "sheet.csv")
    assert not (tmp_path / "sheet.csv").exists()
