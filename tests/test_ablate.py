"""Ablations: a failing variant is told and tried again, what is finished is never done twice."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from conftest import examples, tiny_config
from haechi import ablate
from haechi.ablate import AblateConfig, Variant, interval
from haechi.errors import ConfigError


@pytest.fixture
def grid(bert_base: Path, curated: Path, tmp_path: Path) -> AblateConfig:
    """Two variants that work and one whose base comes late."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(row.model_dump_json() + "\n" for row in examples(3)), encoding="utf-8")
    (tmp_path / "train.yaml").write_text(tiny_config(bert_base, tmp_path / "x", curated).model_dump_json())
    evaluate = {"output": "x", "guards": ["slm"], "sets": [str(rows)], "draws": 100}
    (tmp_path / "evaluate.yaml").write_text(json.dumps(evaluate))
    variants: list[dict[str, Any]] = [
        {"name": "both tasks"},
        {"name": "verdicts only", "train": ["stages.0.tasks=[classify]"]},
        {"name": "late base", "train": [f"base={tmp_path / 'late'}"]},
    ]
    tree = {
        "output": str(tmp_path / "out"),
        "train": str(tmp_path / "train.yaml"),
        "evaluate": str(tmp_path / "evaluate.yaml"),
        "seeds": [0],
        "workers": 2,
        "precision": "fp32",
        "figures": ["validation.auroc", f"{rows}.weighted_f1"],
        "questions": [
            {"name": "tasks", "text": "Does the second task help?", "variants": variants},
            {"name": "again", "text": "The same again?", "variants": variants[:2], "curve": True},
        ],
    }
    return AblateConfig.model_validate_json(json.dumps(tree))


def test_a_failing_variant_is_told_and_only_it_is_tried_again(
    grid: AblateConfig, bert_base: Path, tmp_path: Path
) -> None:
    told: list[str] = []
    result = ablate.run(grid, told.append)
    first, second, late = result["questions"][0]["variants"]
    assert first["figures"]["validation.auroc"]["mean"] > 0.9 and first["parameters"] > 10_000
    assert second["figures"]["validation.auroc"]["difference"]["mean"] is not None
    assert late["failed"] and "cannot load the base model" in late["failed"][0]
    # The second question asks for variants that the first one has already trained.
    assert sum(line.startswith(("1/", "2/", "3/")) for line in told) == 3
    assert result["questions"][1]["variants"][0] == first
    tables = (grid.output / "tables.md").read_text()
    assert "late base (1 failed)" in tables and "- late base: train ended with code 2: error: cannot load" in tables
    assert all((grid.output / name).read_text().startswith("<?xml") for name in ("ablations.svg", "again.svg"))
    assert not list(grid.output.rglob("*.safetensors")) and not list(grid.output.rglob("*.onnx"))
    # What was measured is known from metrics.json alone, wherever the rest is run.
    shutil.rmtree(grid.output / "runs")
    (tmp_path / "late").symlink_to(bert_base)
    told.clear()
    again = ablate.run(grid, told.append)
    assert not again["questions"][0]["variants"][2]["failed"] and again["questions"][1] == result["questions"][1]
    assert [line for line in told if "/3 " in line] == ["3/3 late base, seed 0"]
    # Other rows, other runs: nothing measured on the old ones stands for them.
    (tmp_path / "rows.jsonl").write_text("", encoding="utf-8")
    assert ablate._Grid(grid).key(grid.questions[0].variants[0], 0) not in again["runs"]


def test_a_slip_is_told_before_anything_is_trained(grid: AblateConfig) -> None:
    tree = grid.model_dump(mode="json")
    tree["questions"][0]["variants"][1]["train"] = ["stages.0.taks=[classify]"]
    with pytest.raises(ConfigError, match=r"unknown key 'stages.0.taks'; did you mean 'tasks'"):
        ablate.run(AblateConfig.model_validate_json(json.dumps(tree)))
    tree["questions"][0]["variants"][1] = {"name": "both tasks"}
    with pytest.raises(ValueError, match="same name"):
        AblateConfig.model_validate_json(json.dumps(tree))
    tree["questions"][0]["variants"][1] = {"name": "b", "curate": ["without=[x]"]}
    with pytest.raises(ValueError, match="curate names no configuration"):
        AblateConfig.model_validate_json(json.dumps(tree))
    for figure, message in (("validation.aurok", "mean 'auroc'"), ("xstset.fpr", "neither a set nor 'validation'")):
        with pytest.raises(ConfigError, match=message):
            ablate.run(grid.model_copy(update={"figures": (figure,)}))
    assert not grid.output.exists()


def test_whatever_one_run_stumbles_over_the_others_go_on(grid: AblateConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(grid: object, variant: Variant, *_: object) -> dict[str, Any]:
        if variant.name == "verdicts only":
            raise OSError("No space left on device")
        figures = dict.fromkeys(config.figures, 0.5)
        return {"figures": figures, "parameters": 1, "latency_ms": 1.0, "bytes": 1, "minutes": 1.0}

    config = grid.model_copy(update={"workers": 1})
    # A full disk cannot be had here.
    monkeypatch.setattr(ablate, "_measure", measure)
    first, second, late = ablate.run(config)["questions"][0]["variants"]
    assert second["failed"] == ["OSError: No space left on device"] and not first["failed"] + late["failed"]


def test_intervals_need_two_seeds() -> None:
    assert interval([]) == {"mean": None, "half": None} and interval([0.5])["half"] is None
    assert interval([0.4, 0.6]) == {"mean": pytest.approx(0.5), "half": pytest.approx(1.2706, abs=1e-3)}
