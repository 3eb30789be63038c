"""The house's own rules: imports point one way, the core is light, help and README are what the program prints."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT
from haechi import page
from haechi.guards.slm import load
from haechi.modelfolder import default_model, read_sheet
from haechi.taxonomy import load_taxonomy

SOURCE = ROOT / "src" / "haechi"
LAYERS = [
    ["errors", "config", "schema"],
    [
        "store",
        "taxonomy",
        "template",
        "answers",
        "approved",
        "casing",
        "metrics",
        "modelfolder",
        "hangul",
        "spelling",
        "normalise",
        "perturb",
        "sets",
        "table",
        "card",
        "paper",
        "report",
        "calibration",
        "attacks",
        "figures",
        "remote",
        "llm",
        "paraphrase",
    ],
    ["engines"],
    ["guards", "costs"],
    ["bulk", "curate", "train", "evaluate", "export", "calibrate", "review", "page"],
    ["ablate"],
    ["cli"],
]
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}


def imported(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("haechi.") and name.split(".")[1] in LEVEL}


@pytest.mark.parametrize("file", sorted(SOURCE.rglob("*.py")), ids=lambda file: str(file.relative_to(SOURCE)))
def test_imports_point_one_way(file: Path) -> None:
    room = file.relative_to(SOURCE).parts[0].removesuffix(".py")
    if room == "__init__":
        return
    for other in imported(file) - {room}:
        assert LEVEL[other] <= LEVEL[room], f"{room} imports {other}"
        # A verb imports nouns, engines and guards; evaluation writes the rows that bulk files hold.
        assert LEVEL[room] != 4 or LEVEL[other] < 4 or (room, other) in {("evaluate", "bulk"), ("page", "evaluate")}


def test_the_core_runs_without_torch() -> None:
    code = (
        "import sys, haechi; light = set(sys.modules); verdict = haechi.check('hello'); "
        "heavy = {'torch', 'transformers', 'sklearn', 'pandas', 'datasets'}; "
        "print(sorted(heavy & set(sys.modules)), 'onnxruntime' in light)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "[] False\n", done.stderr


def test_every_help_text_is_in_the_docs() -> None:
    done = subprocess.run([sys.executable, ROOT / "docs" / "make_cli.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_readme_prints_what_it_says() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    code, output = re.findall(r"```python\n(.*?)```\n+```text\n(.*?)```", readme, re.S)[0]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    # The last digit of a score may differ between processors.
    numbers = re.compile(r"\d\.\d+")
    assert numbers.sub("#", done.stdout) == numbers.sub("#", output)
    shown = zip(numbers.findall(done.stdout), numbers.findall(output), strict=True)
    assert all(float(ours) == pytest.approx(float(theirs), abs=0.02) for ours, theirs in shown)


def test_the_shipped_model_is_small_and_of_the_built_in_policy() -> None:
    sheet = read_sheet(default_model())
    assert sheet.taxonomy_version == load_taxonomy().version
    assert sum(file.stat().st_size for file in default_model().iterdir()) < 60e6
    card = (default_model() / "README.md").read_text(encoding="utf-8")
    assert all(code in card for code in load_taxonomy().codes) and sheet.trained_on["safety"]["train"][:16] in card


def test_the_shipped_model_judges_the_demo_queries_and_answers_in_their_language() -> None:
    queries = (ROOT / "examples" / "queries.txt").read_text(encoding="utf-8").splitlines()
    replies = load().answer(queries)
    assert len(queries) >= 12 and all(reply.verdict.error is None for reply in replies)
    assert {reply.language for reply in replies if reply.text} == {"en", "ko"}
    assert all((reply.text is not None) == reply.verdict.unsafe for reply in replies)


def test_results_are_tables_of_their_json() -> None:
    from haechi.report import ablation_tables, tables

    for file in sorted((ROOT / "results").glob("*/metrics.json")):
        result = json.loads(file.read_text("utf-8"))
        made = ablation_tables(result) if "questions" in result else tables(result)
        assert file.with_name("tables.md").read_text("utf-8") == made, file


def test_the_stored_results_of_the_default_model_make_one_page(tmp_path: Path) -> None:
    folders = [ROOT / "results" / name for name in ("haechi-mini", "robustness", "answers", "paper")]
    assert page.run(folders, tmp_path, lambda line: None).stat().st_size > 100_000
