"""The sheet tells nobody whose answer is whose; people and judge are read back; where an answer stood is nothing."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from sklearn.metrics import cohen_kappa_score
from typer.testing import CliRunner

from conftest import REFUSAL, Loopback, examples
from haechi.cli import app
from haechi.errors import ConfigError, DataError
from haechi.guards.slm import load
from haechi.llm import ChatModel
from haechi.review import CRITERIA, ReviewConfig, agreement, run
from haechi.schema import Example
from haechi.store import read_json, write_jsonl


def quiet(line: str) -> None:
    pass


@pytest.fixture
def source(tmp_path: Path) -> Path:
    formula = Example(id="f", lang="en", query="=HYPERLINK(1)", label="unsafe", response=REFUSAL["en"])
    path = tmp_path / "set.jsonl"
    path.write_text("".join(row.model_dump_json() + "\n" for row in [*examples(), formula]), encoding="utf-8")
    return path


def filled(sheet: Path, to: Path, choose: Any) -> Path:
    """A copy of the sheet as a person would fill it."""
    lines = list(csv.DictReader(sheet.read_text(encoding="utf-8-sig").splitlines()))
    with to.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, lines[0].keys())
        writer.writeheader()
        for line in lines:
            writer.writerow({**line, **{f"{name} (A, B or tie)": choose(line, name) for name in CRITERIA}})
    return to


def test_a_sheet_is_blind_and_its_key_opens_it(exported: Path, source: Path, tmp_path: Path) -> None:
    (tmp_path / "review.yaml").write_text(
        f"output: {tmp_path / 'out'}\nset: {source}\nfirst: slm:{exported}\nrows: 40\n"
    )
    done = CliRunner().invoke(app, ["review", str(tmp_path / "review.yaml")])
    assert done.exit_code == 0, done.output
    sheet = tmp_path / "out" / "sheet.csv"
    lines = list(csv.DictReader(sheet.read_text(encoding="utf-8-sig").splitlines()))
    key = read_json(tmp_path / "out" / "key.json")["rows"]
    queries = {row.query: row.response for row in examples() if row.label == "unsafe"} | {
        "=HYPERLINK(1)": REFUSAL["en"]
    }
    assert len(lines) == len(key) == len(queries) and {entry["A"] for entry in key} == {"first", "second"}
    guard = load(exported)
    for line, entry in zip(lines, key, strict=True):
        side, other = ("A", "B") if entry["A"] == "second" else ("B", "A")
        query = line["query"].lstrip("'")
        assert line[f"answer {side}"] == queries[query] and not line["query"].startswith("=")
        assert line[f"answer {other}"] == guard.answer([query], force=True)[0].text
    assert "second" not in sheet.read_text(encoding="utf-8-sig")


def test_people_are_read_back_and_their_agreement_told(exported: Path, source: Path, tmp_path: Path) -> None:
    base: dict[str, Any] = {"output": tmp_path / "out", "set": str(source), "first": f"slm:{exported}"}
    run(ReviewConfig(**base), quiet)
    sheet, orders = tmp_path / "out" / "sheet.csv", read_json(tmp_path / "out" / "key.json")["rows"]

    def reference(line: dict[str, str], name: str) -> str:
        order = orders[int(line["number"]) - 1]
        return {"fluency": "a" if order["A"] == "second" else "B", "helpfulness": " Tie "}.get(name, "")

    ana = filled(sheet, tmp_path / "ana.csv", reference)
    bo = filled(sheet, tmp_path / "bo.csv", lambda line, name: "A" if name == "fluency" else reference(line, name))
    result = run(ReviewConfig(**base, sheets=(ana, bo)), quiet)
    count = result["pairs"]
    fluency, helpful, fit = (result["choices"]["ana"][name] for name in CRITERIA)
    assert fluency["second"] == count and fluency["lead"] == -1 and helpful["tie"] == count and fit["unjudged"] == count
    kappa = result["agreement"]["people"]["fluency"]
    sides = [order["A"] for order in orders]
    assert kappa["of"] == "Cohen" and kappa["kappa"] == pytest.approx(cohen_kappa_score(["second"] * count, sides))
    assert "Cohen's kappa" in (tmp_path / "out" / "tables.md").read_text(encoding="utf-8")
    for choose, message in ((lambda line, name: "C", "'c', not A, B or tie"),):
        with pytest.raises(DataError, match=message):
            run(ReviewConfig(**base, sheets=(filled(sheet, tmp_path / "bad.csv", choose),)), quiet)
    (tmp_path / "bad.csv").write_text("number\n1\n")
    with pytest.raises(DataError, match="no filled copy"):
        run(ReviewConfig(**base, sheets=(tmp_path / "bad.csv",)), quiet)
    with pytest.raises(ConfigError, match="holds another comparison"):
        run(ReviewConfig(**base, rows=3), quiet)
    source.write_text(
        source.read_text(encoding="utf-8").replace(REFUSAL["en"], "I would rather not."), encoding="utf-8"
    )
    with pytest.raises(ConfigError, match="holds another comparison"):
        run(ReviewConfig(**base), quiet)


def test_fleiss_kappa_is_that_of_his_paper() -> None:
    # The example of Fleiss (1971) as Wikipedia restates it: 14 raters, 10 subjects, 5 categories, kappa 0.210.
    table = [
        [0, 0, 0, 0, 14], [0, 2, 6, 4, 2], [0, 0, 3, 5, 6], [0, 3, 9, 2, 0], [2, 2, 8, 1, 1],
        [7, 7, 0, 0, 0], [3, 2, 6, 3, 0], [2, 5, 3, 2, 2], [6, 5, 2, 1, 0], [0, 2, 2, 3, 7],
    ]  # fmt: skip
    subjects = [[str(name) for name, count in enumerate(row) for _ in range(count)] for row in table]
    assert agreement(list(zip(*subjects, strict=True)))["kappa"] == pytest.approx(0.210, abs=5e-4)
    assert agreement([["first"] * 3, ["first"] * 3])["kappa"] is None


def test_a_judge_that_only_likes_the_first_place_finds_ties(server: Loopback, source: Path, tmp_path: Path) -> None:
    stored = tmp_path / "stored.jsonl"
    write_jsonl(stored, [{"id": row.id, "answer": "No, and never ask again."} for row in examples()] +
                [{"id": "f", "answer": "No."}])  # fmt: skip

    def reply(path: str, body: Any, number: int) -> Any:
        shown = body["messages"][1]["content"]
        better = "B" if "<reply A>No" in shown else "A"
        said = {"fluency": "A", "helpfulness": better, "appropriateness": "tie"}
        return 200, {
            "choices": [{"message": {"content": f"```json\n{json.dumps(said)}\n```"}, "finish_reason": "stop"}]
        }

    server.reply = reply
    config = ReviewConfig(
        output=tmp_path / "out", set=str(source), first=f"file:{stored}", second="reference",
        judge=ChatModel(model="m", url=server.url),
    )  # fmt: skip
    for _ in range(2):
        result = run(config, quiet)
        assert len(server.asked) == 2 * result["pairs"], "both orders are asked, and once"
    tallies = result["choices"]["judge m"]
    assert tallies["fluency"]["tie"] == tallies["appropriateness"]["tie"] == tallies["helpfulness"]["second"] == 21
    assert result["checks"]["first"]["problems"]["length"] == 1
    server.reply = lambda path, body, number: (403, {"error": {"message": "no"}})
    with pytest.raises(ConfigError, match=r"judged none of 21 pairs: .* said 403"):
        run(config.model_copy(update={"output": tmp_path / "again"}), quiet)


def test_what_cannot_be_reviewed_is_one_line(exported: Path, source: Path, tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("bomb\n")
    (tmp_path / "bare.jsonl").write_text('{"query": "a", "label": "unsafe"}\n')
    (tmp_path / "few.jsonl").write_text('{"id": "f", "answer": "No."}\n')
    for settings, kind, message in (
        ({"first": f"keyword:{tmp_path / 'words.txt'}"}, ConfigError, "verdicts only"),
        ({"set": str(tmp_path / "bare.jsonl")}, DataError, "no harmful rows with a reference answer"),
        ({"first": "file:none.jsonl"}, DataError, "no such file: none.jsonl"),
        ({"first": f"file:{tmp_path / 'few.jsonl'}"}, DataError, "no answer to 20 of 21 rows"),
    ):
        base = {"output": tmp_path / "out", "set": str(source), "first": f"slm:{exported}"}
        with pytest.raises(kind, match=message):
            run(ReviewConfig(**{**base, **settings}), quiet)
    assert not (tmp_path / "out" / "sheet.csv").exists()
