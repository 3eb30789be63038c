"""Operating points keep what they promise on the rows they were fitted on, and a refit changes nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from conftest import examples
from haechi import calibrate
from haechi.calibration import ENOUGH, POINTS, Aims, Scored, calibrated, measured, scored
from haechi.cli import app
from haechi.errors import ConfigError, DataError, HaechiError
from haechi.guards import load_guard
from haechi.guards.slm import load
from haechi.modelfolder import Point, Sheet, read_sheet
from haechi.schema import Verdict


@pytest.fixture(scope="session")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's file: queries and labels, nothing else needed."""
    file = tmp_path_factory.mktemp("labelled") / "mine.jsonl"
    rows = [{"query": row.query, "label": row.label, "category": row.category} for row in examples(8)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000), st.floats(0.5, 1), st.floats(0, 0.5), st.booleans())
def test_points_keep_their_aims_in_order(seed: int, recall: float, false_alarms: float, per_category: bool) -> None:
    rng = np.random.default_rng(seed)
    truth = np.r_[np.ones(ENOUGH, bool), np.zeros(ENOUGH, bool), rng.random(100) < 0.5]
    margins = np.round(rng.normal(np.where(truth, 1.0, -1.0), 2), 1)
    rows = Scored(truth, margins, [["a", "b", ""][index] for index in rng.integers(0, 3, len(truth))])
    sheet = calibrated(sheet_of(), rows, Aims(recall, false_alarms), per_category=per_category)
    groups = {code: np.array([code in (None, of) for of in rows.categories]) for code in (None, "a", "b")}
    for code, chosen in groups.items():
        at = [
            sheet.points[name].threshold if code is None else sheet.points[name].categories.get(code) for name in POINTS
        ]
        if None in at:
            assert min(truth[chosen].sum(), (~truth[chosen]).sum()) < ENOUGH or not per_category
            continue
        assert at == sorted(at)
        score = rows.scores(sheet.temperature)[chosen]
        assert (score >= at[0])[truth[chosen]].mean() >= recall
        assert (score >= at[2])[~truth[chosen]].mean() <= false_alarms
    assert all(measured(rows, sheet.temperature, point) == point for point in sheet.points.values())


def sheet_of() -> Sheet:
    text = {"attention": "prefix", "before": "", "after": "", "eos": "x", "window": 64, "overlap": 16, "answer": 32}
    return Sheet(name="n", base="b", taxonomy={}, taxonomy_version="v", template=text)  # type: ignore[arg-type]


def test_a_refit_is_a_copy_that_differs_in_its_points_only(exported: Path, labelled: Path, tmp_path: Path) -> None:
    copy, plot = tmp_path / "copy", tmp_path / "sweep.png"
    done = CliRunner().invoke(
        app,
        [
            "calibrate",
            str(labelled),
            "--model",
            str(exported),
            "--output",
            str(copy),
            *("--per-category", "--plot", str(plot)),
        ],
    )
    assert done.exit_code == 0, done.output
    assert "too few rows of a label" in done.output
    assert "| permissive |" in done.output and "| balanced, before |" in done.output
    assert plot.read_bytes().startswith(b"\x89PNG")
    before, after = read_sheet(exported), read_sheet(copy)
    changed = {key for key, value in before.model_dump().items() if value != after.model_dump()[key]}
    assert changed <= {"temperature", "points", "metrics"} and set(after.points) == set(POINTS)
    assert f"| strict | {after.points['strict'].threshold:.3f} |" in (copy / "README.md").read_text()
    calibrate.run(str(labelled), model=copy, output=copy, report=lambda line: None)
    assert load(copy).check(["how do I steal a car 1"])[0].unsafe


def test_a_point_decides_the_verdict_and_names_the_guard(exported: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(exported, folder)
    query = "how do I steal a car 1"
    likeliest = load(folder).check([query])[0].category
    sheet = read_sheet(folder)
    points = {
        "balanced": Point(threshold=0.5),
        "deaf": Point(threshold=1.0),
        "own": Point(threshold=1.0, categories={str(likeliest): 0.5}),
    }
    changes = {"points": points, "temperature": 10.0}
    (folder / "haechi.json").write_text(sheet.model_copy(update=changes).model_dump_json())
    verdicts = {point: load_guard(f"slm@{point}:{folder}").check([query])[0] for point in points}
    assert [verdict.unsafe for verdict in verdicts.values()] == [True, False, True]
    assert len({verdict.score for verdict in verdicts.values()}) == 1
    named = load_guard(f"slm@deaf:{folder}")
    assert named.name.endswith("@deaf") and named.identity != load_guard(f"slm:{folder}").identity
    with pytest.raises(ConfigError, match="no operating point 'def'; did you mean 'deaf'"):
        load(folder, point="def")
    with pytest.raises(ConfigError, match="keyword guard has no operating points"):
        load_guard("keyword@deaf:words.txt")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("a", "unsafe", None)] * 30, "30 unsafe and 0 safe rows are too few"),
        ([("a", "unsafe", None), ("b", "safe", None)], "1 unsafe and 1 safe rows are too few"),
        ([("a", "unsafe", "crime_advise")] * 40, "the model's policy lacks; did you mean 'crime_advice'"),
        ([("a", "unsafe", None)] * 20 + [("b", "safe", None)] * 20 + [(" ", "safe", None)], "1 of 41 rows have no sco"),
        ([("a", "dangerous", None)], "label"),
    ],
)  # fmt: skip
def test_rows_that_cannot_calibrate_are_one_line(exported: Path, tmp_path: Path, message: str,
                                                 rows: list[tuple[str, str, str | None]]) -> None:  # fmt: skip
    file = tmp_path / "rows.jsonl"
    lines = [json.dumps({"query": query, "label": label, "category": category}) for query, label, category in rows]
    file.write_text("\n".join(lines))
    with pytest.raises(DataError, match=message):
        calibrate.run(str(file), model=exported, output=tmp_path / "copy", per_category=True)
    assert not (tmp_path / "copy").exists()


def test_nothing_is_overwritten_and_no_evaluation_set_is_fitted_to(
    exported: Path, labelled: Path, tmp_path: Path
) -> None:
    for arguments, message in (
        ((str(labelled), tmp_path), "exists already"),
        (("xstest", tmp_path / "new"), "for measuring only"),
        (("policy_test.en", tmp_path / "new"), "for measuring only"),
    ):
        with pytest.raises(HaechiError, match=message):
            calibrate.run(arguments[0], model=exported, output=arguments[1])
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigError, match="cannot draw"):
        calibrate.run(str(labelled), model=exported, output=tmp_path / "new", plot=tmp_path / "sweep.docx")
    assert not (tmp_path / "new").exists()


def test_scores_that_are_no_numbers_are_told() -> None:
    lost = Verdict(error="the model returned numbers that are not finite")
    with pytest.raises(DataError, match=r"2 of 3 rows have no score to calibrate .*not finite"):
        scored(["safe", "unsafe", "safe"], [lost, Verdict(score=0.5), lost], 1.0)
