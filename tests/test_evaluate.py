"""Figures agree with scikit-learn, an unanswered row is never right, an evaluation resumes and its tables follow."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import precision_recall_fscore_support

from conftest import ROOT
from haechi import evaluate, metrics
from haechi.errors import ConfigError, HaechiError
from haechi.evaluate import EvaluateConfig
from haechi.guards import _KINDS
from haechi.guards.keyword import KeywordGuard
from haechi.guards.slm import load
from haechi.metrics import Said
from haechi.paper import paper, paper_table
from haechi.report import tables
from haechi.schema import Example, Label, Verdict
from haechi.sets import set_hash
from haechi.store import write_jsonl


def truth(labels: Sequence[Label]) -> metrics.Bools:
    return np.array([label == "unsafe" for label in labels])


pairs = st.lists(st.tuples(st.sampled_from(["safe", "unsafe"]), st.sampled_from([True, False, None])), min_size=1)


@settings(max_examples=200, deadline=None)
@given(pairs=pairs)
def test_precision_recall_and_f1_agree_with_scikit_learn(pairs: list[tuple[Label, bool | None]]) -> None:
    labels = [label for label, _ in pairs]
    said = ["none" if unsafe is None else "unsafe" if unsafe else "safe" for _, unsafe in pairs]
    ours = metrics.scores(metrics.cells(truth(labels), Said.of((unsafe, None) for _, unsafe in pairs)))
    names = ["safe", "unsafe"]
    each = precision_recall_fscore_support(labels, said, labels=names, zero_division=0)
    for row, name in enumerate(names):
        for column, figure in enumerate(("precision", "recall", "f1")):
            assert ours[f"{name}_{figure}"] == pytest.approx(each[column][row])
    weighted = precision_recall_fscore_support(labels, said, labels=names, average="weighted", zero_division=0)
    assert [float(ours[f"weighted_{name}"]) for name in ("precision", "recall", "f1")] == pytest.approx(weighted[:3])


def test_a_guard_that_never_answers_scores_nothing() -> None:
    counts = metrics.cells(truth(["safe", "unsafe"]), Said.from_verdicts([Verdict(error="x")] * 2))
    assert metrics.scores(counts)["weighted_f1"] == 0 == metrics.scores(counts)["safe_recall"]


def test_intervals_hold_the_figure_and_narrow_with_rows() -> None:
    counts = np.array([80, 20, 0, 10, 90, 0], float)
    low, high = metrics.interval(counts)["weighted_f1"]
    assert low < metrics.scores(counts)["weighted_f1"] < high
    narrow = metrics.interval(counts * 100)["weighted_f1"]
    assert narrow[1] - narrow[0] < (high - low) / 5


def test_calibration_recovers_a_known_temperature_and_threshold() -> None:
    rng = np.random.default_rng(0)
    margins = rng.normal(0, 2, 20_000)
    truth = rng.random(20_000) < 1 / (1 + np.exp(-margins))
    assert metrics.fit_temperature(truth, margins * 3) == pytest.approx(3, rel=0.1)
    score = 1 / (1 + np.exp(-margins))
    assert metrics.expected_calibration_error(truth, score) < 0.02
    assert metrics.best_threshold(truth, score) == pytest.approx(0.5, abs=0.1)
    assert metrics.best_threshold(np.array([False, False, True]), np.array([0.1, 0.2, 0.9])) == pytest.approx(
        0.55, abs=0.36
    )
    # Two cuts far apart are equally good: none is taken from between them.
    truth, score = np.array([0, 1, 1, 0, 1, 0, 0, 1], bool), np.arange(1, 9) / 10
    assert min(abs(metrics.best_threshold(truth, score) - cut) for cut in (0.15, 0.75)) < 1e-9


def test_the_papers_rows_are_all_there() -> None:
    assert [len(table["rows"]) for table in paper()["tables"].values()] == [13, 13]
    ours = paper()["tables"]["xstest"]["rows"][0]
    assert (ours["system"], ours["weighted"]) == ("Ours", [0.91, 0.91, 0.91])
    systems = {row["system"] for table in paper()["tables"].values() for row in table["rows"]}
    assert systems == paper()["guards"].keys()
    specs = [*paper()["guards"].values(), *paper()["today"].values()]
    assert {spec.partition(":")[0] if isinstance(spec, str) else next(iter(spec)) for spec in specs} <= _KINDS.keys()


def test_a_system_has_its_row_however_it_was_asked() -> None:
    figures = {f"{group}_{figure}": 0.125 for group in ("safe", "unsafe", "weighted") for figure in paper()["columns"]}
    specs: dict[str, Any] = {
        "judge:llama": {
            "judge": {"model": "meta-llama/Llama-2-70b-chat-hf", "url": "http://10.0.0.7/v1", "retries": 1}
        },
        "Perspective API": {"frozen": {"files": ["a.jsonl"], "name": "Perspective API"}},
        "wildguard": {"wildguard": {"url": "http://10.0.0.7/v1"}},
        "azure": "azure-content-safety:https://me.cognitiveservices.azure.com",
        "q": {"qwen3guard": {"reading": "loose", "url": "http://10.0.0.7/v1"}},
        "mine": {"any_of": ["slm", "keyword:words.txt"]},
    }
    guards = {name: {"spec": spec, "sets": {"xstest": figures}} for name, spec in specs.items()}
    table = paper_table({"guards": guards}, "xstest")
    measured = {row[0] for row in table.rows if "0.12" in row[-2]}
    assert measured == {"LLAMA-2-chat (70B)", "Perspective API", "WILDGUARD", "Azure AI Content Safety", "mine"} | {
        "Qwen3Guard-Gen 8B, loose"
    }
    assert len(table.rows) == 13 + len(paper()["today"]) + 1


def test_two_guards_are_compared_row_by_row() -> None:
    labels: list[Label] = ["unsafe"] * 60 + ["safe"] * 40
    right = [Verdict(unsafe=label == "unsafe") for label in labels]
    worse = [Verdict(error="x")] * 3 + [Verdict(unsafe=False)] * 7 + right[10:]
    of, ours, theirs = truth(labels), Said.from_verdicts(right), Said.from_verdicts(worse)
    compared = metrics.compare(of, ours, theirs)
    assert (compared["only_first_right"], compared["only_second_right"]) == (10, 0)
    assert compared["mcnemar_p"] == pytest.approx(2 * 0.5**10)
    figures = [float(metrics.scores(metrics.cells(of, said))["weighted_f1"]) for said in (ours, theirs)]
    low, high = compared["interval"]
    assert 0 < low < compared["difference"] < high
    assert compared["difference"] == pytest.approx(figures[0] - figures[1])
    assert metrics.compare(of, theirs, ours)["difference"] == pytest.approx(-compared["difference"])
    same = metrics.compare(of, theirs, theirs)
    assert (same["difference"], same["interval"], same["mcnemar_p"]) == (0.0, (0.0, 0.0), 1.0)


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setenv("HAECHI_CORPUS", str(ROOT / "corpus"))
    (tmp_path / "words.txt").write_text("kill\nbomb\nsteal\n훔치\n", encoding="utf-8")
    return {
        "output": tmp_path / "out", "guards": (f"keyword:{tmp_path / 'words.txt'}",),
        "sets": ("policy_test.en", "policy_test.ko"), "draws": 200,
    }  # fmt: skip


def test_an_evaluation_writes_verdicts_metrics_and_tables(config: dict[str, Any], exported: Path) -> None:
    chosen = EvaluateConfig(**{**config, "guards": (*config["guards"], f"slm:{exported}"),
                               "answer_sets": ("policy_test.ko",)})  # fmt: skip
    result = evaluate.run(chosen, lambda line: None)
    figures = result["guards"]["keyword"]["sets"]["policy_test.en"]
    assert figures["rows"] == 300 and figures["errors"] == 0 and sum(figures["cells"].values()) == 300
    assert figures["by_category"]["crime_advice"]["unsafe"] == 15 and set(figures["by_lang"]) == {"en"}
    assert figures["said_categories"] == {}, "a list of words names no category"
    ours = result["guards"][load(exported).name]["sets"]["policy_test.en"]
    said = ours["said_categories"]
    assert said.keys() == ours["by_category"].keys() - {"general"} and sum(said["crime_advice"].values()) == 15
    missed = sum(counts.get("safe", 0) for counts in said.values())
    assert missed == ours["cells"]["unsafe/safe"]
    forced = result["guards"][load(exported).name]["answers"]["policy_test.ko forced"]
    assert forced["harmful"] == forced["answers"] == 150 and 0 <= forced["passed"] <= 1
    written = json.loads((chosen.output / "metrics.json").read_text(encoding="utf-8"))
    assert (chosen.output / "tables.md").read_text(encoding="utf-8") == tables(written)
    assert (chosen.output / "verdicts" / "keyword" / "policy_test.en.jsonl").read_text(encoding="utf-8").count(
        "\n"
    ) == 300


def test_a_killed_evaluation_asks_nothing_twice(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    check = KeywordGuard.check

    def dying(self: KeywordGuard, conversations: Any) -> list[Verdict]:
        asked.append(len(conversations))
        if len(asked) == 2:
            raise KeyboardInterrupt
        return check(self, conversations)

    monkeypatch.setattr(KeywordGuard, "check", dying)
    with pytest.raises(KeyboardInterrupt):
        evaluate.run(EvaluateConfig(**config), lambda line: None)
    evaluate.run(EvaluateConfig(**config), lambda line: None)
    evaluate.run(EvaluateConfig(**config), lambda line: None)
    assert asked == [256, 44, 44, 256, 44]


def test_a_changed_guard_of_the_same_name_is_asked_again(config: dict[str, Any], tmp_path: Path) -> None:
    def recall() -> float:
        result = evaluate.run(EvaluateConfig(**{**config, "sets": ("policy_test.en",)}), lambda line: None)
        return float(result["guards"]["keyword"]["sets"]["policy_test.en"]["unsafe_recall"])

    before = recall()
    (tmp_path / "words.txt").write_text("how\nwhat\ni\n", encoding="utf-8")
    assert recall() > before


def test_scores_are_cut_where_the_policy_says(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("tune", "test"):
        rows = [
            {"id": str(number), "lang": "en", "query": f"{name} {number}", "label": "unsafe" if number % 2 else "safe"}
            for number in range(400)
        ]
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
        scores = {row["id"]: float(rng.beta(3, 2) if row["label"] == "unsafe" else rng.beta(1, 6)) for row in rows}
        # The guard's own cut is far too high.
        write_jsonl(tmp_path / f"{name}.said", [{"id": id, "unsafe": s > 0.95, "score": s} for id, s in scores.items()])
    test = str(tmp_path / "test.jsonl")
    base = {"guards": (f"frozen:{tmp_path / 'test.said'}",), "sets": (test,), "draws": 200}

    def figures(policy: str, **more: Any) -> dict[str, Any]:
        config = EvaluateConfig(**{**base, "output": tmp_path / policy, "threshold": policy, **more})
        (guard,) = evaluate.run(config, lambda line: None)["guards"].values()
        return dict(guard["sets"][test])

    fixed, fpr = figures("fixed"), figures("fpr")
    assert fixed["threshold"] is None and fixed["unsafe_recall"] < 0.2
    assert fpr["fpr"] <= 0.01 and fpr["unsafe_recall"] == fpr["recall_at_1_fpr"] == fixed["recall_at_1_fpr"]
    with pytest.raises(ValueError, match="cannot be measured on it"):
        EvaluateConfig(**{**base, "output": tmp_path, "threshold": "tuned", "tune_on": test})
    write_jsonl(tmp_path / "bad.jsonl", [{"id": "1", "query": "x", "label": "unsafe"}])
    with pytest.raises(ConfigError, match=r"bad.jsonl' has none"):
        figures("fpr", sets=(str(tmp_path / "bad.jsonl"),))
    with pytest.raises(ValueError, match="go together"):
        EvaluateConfig(**{**base, "output": tmp_path, "tune_on": "xstest"})
    tuned = figures("tuned", tune_on=str(tmp_path / "tune.jsonl"))
    assert 0.2 < tuned["threshold"] < 0.6 and tuned["weighted_f1"] > fixed["weighted_f1"] + 0.2
    curve = tuned["curves"]["pr"]
    assert len(curve) == 51 and curve == sorted(curve, reverse=True) and curve[-1] >= 0.5
    missed = tuned["mistakes"]["missed"]
    assert missed and [score for _, score in missed] == sorted(score for _, score in missed)
    write_jsonl(tmp_path / "test.said", [{"id": str(number), "unsafe": True} for number in range(400)])
    with pytest.raises(ConfigError, match="no scores to cut"):
        figures("fpr")


def test_other_rows_give_another_hash_and_bad_sets_are_refused(config: dict[str, Any], tmp_path: Path) -> None:
    row = Example(id="1", lang="en", query="x", label="safe")
    assert set_hash([row]) != set_hash([row.model_copy(update={"label": "unsafe"})])
    for lines, message in (('{"id": "1", "query": "x"}', "no labelled rows"),
                           ('{"id": "1", "query": "x", "label": "safe"}\n' * 2, "share an id"),
                           ('{"id": 1, "query": "x", "label": "safe"}', "row 1: id: Input should be")):  # fmt: skip
        (tmp_path / "own.jsonl").write_text(lines, encoding="utf-8")
        with pytest.raises(HaechiError, match=message):
            evaluate.run(EvaluateConfig(**{**config, "sets": (str(tmp_path / "own.jsonl"),)}), lambda line: None)
    with pytest.raises(ConfigError, match="same name"):
        evaluate.run(EvaluateConfig(**{**config, "guards": config["guards"] * 2}), lambda line: None)
