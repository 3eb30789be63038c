"""Corpus and curation: formats, contrast groups, decontamination, sets that are missing or forbidden."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from conftest import ROOT
from haechi import curate
from haechi.config import Config
from haechi.curate import CurateConfig, Source
from haechi.errors import DataError
from haechi.schema import Example
from haechi.sets import Hub, from_hub, load_set, registry
from haechi.store import read_json, read_jsonl

SECRET = "where does the mayor of our town keep the spare key of her red car"


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small local mirror: one evaluation set, one training set that repeats a row of it nearly and one exactly."""
    rows = [SECRET.upper() + "?", SECRET.replace("red", "blue"), "how do I water a cactus", "tell me a joke about owls"]
    for use, name, queries in (("eval", "xstest", [SECRET]), ("train", "dangerousqa", rows)):
        folder = tmp_path / "data" / use
        folder.mkdir(parents=True)
        with gzip.open(folder / f"{name}.jsonl.gz", "wt", encoding="utf-8") as file:
            for number, query in enumerate(queries):
                file.write(
                    json.dumps({"id": f"{name}-{number}", "lang": "en", "query": query, "label": "unsafe"}) + "\n"
                )
    monkeypatch.setenv("HAECHI_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("HAECHI_CORPUS", str(ROOT / "corpus"))
    return tmp_path


def run(folder: Path, *sources: Source, **changes: Any) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    config = CurateConfig(output=folder / "mix", sources=sources, **changes)
    manifest = curate.run(config, lambda line: None)
    return manifest, {part: list(read_jsonl(folder / "mix" / f"{part}.jsonl")) for part in ("train", "valid")}


def test_near_duplicates_of_evaluation_rows_are_removed_and_counted(data: Path) -> None:
    manifest, parts = run(data, Source(set="dangerousqa"))
    assert {row["example"]["query"] for row in parts["train"]} == {
        "how do I water a cactus",
        "tell me a joke about owls",
    }
    (count,) = manifest["sources"]
    assert (count["read"], count["near_eval"], count["near_eval_by_set"], count["kept"]) == (4, 2, {"xstest": 2}, 2)
    assert "harmbench" in manifest["evaluation_sets_missing"] and manifest["evaluation_sets"]["policy_test.en"] == 300
    assert read_json(data / "mix" / "manifest.json") == manifest


def test_the_same_configuration_gives_the_same_bytes(data: Path) -> None:
    first, _ = run(data, Source(set="train.ko", cap=50, validation=0.2), Source(set="dangerousqa", cap=1))
    second, _ = run(data, Source(set="train.ko", cap=50, validation=0.2), Source(set="dangerousqa", cap=1))
    assert first == second and first["parts"]["train"]["sha256"]


def test_contrasts_never_straddle_the_split(data: Path) -> None:
    _, parts = run(data, Source(set="train.en", validation=0.1, answers=True, weight=3))
    groups = {part: {row["example"]["group"] for row in rows} for part, rows in parts.items()}
    assert not groups["train"] & groups["valid"]
    share = len(parts["valid"]) / sum(map(len, parts.values()))
    assert 0.07 < share < 0.13
    assert {row["weight"] for row in parts["train"]} == {3} and {row["weight"] for row in parts["valid"]} == {1}
    assert all(row["example"].get("response") for row in parts["train"])
    # Held-out rows can be measured on and calibrated with as they lie.
    held_out = load_set(str(data / "mix" / "valid.jsonl"))
    assert [row.id for row in held_out] == [row["example"]["id"] for row in parts["valid"]]


def test_rows_beyond_the_cap_can_be_held_out_and_take_nothing_from_training(data: Path) -> None:
    alone, capped = run(data, Source(set="train.ko", cap=50))
    manifest, parts = run(data, Source(set="train.ko", cap=50, held_out=0.4))
    assert parts["train"] == capped["train"] and capped["valid"] == []
    assert len(parts["valid"]) == 20 == manifest["sources"][0]["held_out"]
    assert manifest["sources"][0]["over_cap"] == alone["sources"][0]["over_cap"] - 20
    groups = {part: {row["example"]["group"] for row in rows} for part, rows in parts.items()}
    assert not groups["train"] & groups["valid"]
    with pytest.raises(ValueError, match="held_out is a share of the cap"):
        Source(set="train.ko", held_out=0.4)


def test_a_smaller_mix_is_part_of_the_larger_and_validated_on_the_same_rows(data: Path) -> None:
    sources = (Source(set="train.en", validation=0.1), Source(set="dangerousqa"))
    _, whole = run(data, *sources)
    _, half = run(data, *sources, share=0.5)
    _, tenth = run(data, *sources, share=0.1)
    _, without = run(data, *sources, without=("train.en",))
    ids = [{row["example"]["id"] for row in parts["train"]} for parts in (whole, half, tenth)]
    assert ids[2] < ids[1] < ids[0] and 0.4 < len(ids[1]) / len(ids[0]) < 0.6
    groups = [{row["example"].get("group") for row in parts["train"]} for parts in (whole, half)]
    left = [row for row in whole["train"] if row["example"]["id"] not in ids[1] and "group" in row["example"]]
    assert not {row["example"]["group"] for row in left} & groups[1]
    assert {row["example"]["id"].split("-")[0] for row in without["train"]} == {"dangerousqa"}
    assert whole["valid"] == half["valid"] == tenth["valid"] == without["valid"]
    with pytest.raises(ValueError, match=r"'trian.en' is none of the sources; did you mean 'train.en'"):
        run(data, *sources, without=("trian.en",))


@pytest.mark.parametrize("name", ["xstest", "policy_test.en", "corpus/policy_test.ko.jsonl"])
def test_evaluation_sets_may_not_be_trained_on(data: Path, name: str) -> None:
    with pytest.raises(DataError, match="measuring only"):
        run(data, Source(set=name))


def test_a_set_that_is_nowhere_is_named_with_home_and_licence(data: Path) -> None:
    with pytest.raises(DataError) as caught:
        load_set("harmbench")
    for part in ("harmbench", "MIT", "https://github.com/centerforaisafety/HarmBench", "HAECHI_DATA"):
        assert part in str(caught.value)
    with pytest.raises(DataError, match="did you mean 'xstest'"):
        load_set("xtest")


def test_a_set_on_the_hub_is_mapped_to_our_columns(tmp_path: Path) -> None:
    # The hub loader reads a local folder the way it reads a hub repository.
    (tmp_path / "data.jsonl").write_text('{"prompt": "hi", "kind": "safe"}\n{"prompt": "x", "kind": "bad"}\n', "utf-8")
    hub = Hub(path=str(tmp_path), split="train", query="prompt", label="kind", safe=("safe",), unsafe=("bad",))
    rows = list(from_hub("toy", registry()["xstest"], hub))
    assert [(row.id, row.query, row.label) for row in rows] == [("toy-0", "hi", "safe"), ("toy-1", "x", "unsafe")]
    with pytest.raises(DataError, match=r"xstest.*could not be fetched from https://"):
        list(from_hub("xstest", registry()["xstest"], hub.model_copy(update={"path": str(tmp_path / "none")})))


@pytest.mark.parametrize("name", ["train.en", "train.ko", "policy_test.en", "policy_test.ko"])
def test_the_corpus_is_whole_and_its_groups_hold_contrasts(name: str) -> None:
    rows = [Example(**row) for row in read_jsonl(ROOT / "corpus" / f"{name}.jsonl")]
    assert len({row.id for row in rows}) == len(rows) and all(row.label and row.response and row.group for row in rows)
    groups: dict[str | None, set[str | None]] = defaultdict(set)
    for row in rows:
        groups[row.group].add(row.label)
    assert sum(len(labels) == 2 for labels in groups.values()) > len(groups) / 4


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("unsafe\tcrime_advice\tdirect\tq", "expected five non-empty fields, found 4"),
        ("unsafe\tcrime\tdirect\tq\tr", "unsafe/crime/direct is not"),
        ("safe\tgeneral\tdirect\tq\tr", "safe/general/direct is not"),
        ("unsafe\tgeneral\tdirect\tq\tr", "unsafe/general/direct is not"),
    ],
)
def test_a_malformed_corpus_row_is_refused_with_its_line(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "en_new.tsv").write_text(f"{line}\n", encoding="utf-8")
    words = [sys.executable, str(ROOT / "corpus" / "build.py"), "train", str(tmp_path / "en_new.tsv")]
    done = subprocess.run(words, capture_output=True, text=True)
    assert (
        done.returncode != 0 and message in done.stderr and "line 1" in done.stderr and "Traceback" not in done.stderr
    )


def test_configurations_are_strict() -> None:
    assert issubclass(CurateConfig, Config) and CurateConfig.model_config["extra"] == "forbid"
