"""`haechi ablate CONFIG`: questions put to the recipe, each answered by training and measuring a few variants of it.

A variant is a list of overrides; every variant is curated, trained, exported and evaluated by the same verbs a user
calls, each in a process of its own, once per seed. What is finished is kept, a failure is told in the table and tried
again by the next run. Variants of equal overrides, in whatever question, are trained once.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any, Self

import numpy as np
from pydantic import Field, model_validator

from haechi.config import Config, load_config, read_yaml
from haechi.curate import CurateConfig
from haechi.errors import ConfigError, DataError, HaechiError, did_you_mean
from haechi.evaluate import EvaluateConfig
from haechi.figures import Sized, ablation_plot, size_plot
from haechi.guards.slm import load
from haechi.metrics import CELLS, RANKING, scores
from haechi.modelfolder import DEFAULT_POINT, read_sheet
from haechi.report import ablation_tables
from haechi.sets import set_file
from haechi.store import digest, fingerprint, read_json, write_json, write_text
from haechi.train.config import TrainConfig

_LATENCY_QUERIES = 200


class Overrides(Config):
    """`key=value` words for each verb, as on the command line."""

    curate: tuple[str, ...] = ()
    """Overrides of the curation."""
    train: tuple[str, ...] = ()
    """Overrides of the training."""
    evaluate: tuple[str, ...] = ()
    """Overrides of the evaluation."""


class Variant(Overrides):
    """One way to make the model."""

    name: str
    """What the table calls it."""


class Question(Config):
    """Variants that are compared with the first of them."""

    name: str
    """Short name."""
    text: str
    """What is asked."""
    variants: tuple[Variant, ...] = Field(min_length=2)
    """The first one is what the others are compared with."""
    curve: bool = False
    """Also draw quality over the number of parameters."""


class AblateConfig(Config):
    """A grid of variants and seeds."""

    output: Path
    """Folder for metrics.json, tables.md, the figures, and runs/ with logs and verdicts."""
    curate: Path | None = None
    """Configuration of the curation; stages that read its output read the variant's own instead. None: the rows are
    there and the same for all."""
    train: Path
    """Configuration of the training that is varied."""
    evaluate: Path
    """Configuration of the evaluation; its guards are replaced by the variant's model."""
    always: Overrides = Overrides()
    """Overrides of every variant, before its own."""
    seeds: tuple[int, ...] = Field(default=(0, 1, 2), min_length=1)
    """Seeds of the training; intervals need two."""
    workers: int = Field(default=1, gt=0)
    """Runs side by side, the cores shared among them: small models do not fill many cores. Their latencies disturb each
    other."""
    figures: tuple[str, ...] = Field(default=("validation.auroc",), min_length=1)
    """Columns: `SET.FIGURE` of the evaluation, `SET.answers` (share of answers that pass all checks),
    `validation.auroc` or `validation.weighted_f1`."""
    precision: str = "int8"
    """What is evaluated: the export in int8 or fp32."""
    questions: tuple[Question, ...] = Field(min_length=1)
    """In the order of the tables."""

    @model_validator(mode="after")
    def _names_are_unique(self) -> Self:
        for names in (
            [question.name for question in self.questions],
            *([variant.name for variant in question.variants] for question in self.questions),
        ):
            if len(set(names)) < len(names):
                raise ValueError(f"two of {', '.join(names)} have the same name")
        if self.curate is None and any(self.words(variant, "curate") for variant in self.variants()):
            raise ValueError("a variant overrides the curation, but curate names no configuration")
        return self

    def variants(self) -> Iterator[Variant]:
        """Every variant of every question."""
        for question in self.questions:
            yield from question.variants

    def words(self, variant: Variant, verb: str) -> tuple[str, ...]:
        """All overrides of a verb for a variant."""
        return (*getattr(self.always, verb), *getattr(variant, verb))


def run(config: AblateConfig, report: Callable[[str], None] = print) -> dict[str, Any]:
    """Train and measure what is missing; after each run metrics.json, tables.md and the figures show what is there.

    metrics.json alone says what has been measured: with it in place, on this machine or another, only the rest is run.
    Returns its contents. Raises ConfigError or DataError before anything is trained when a configuration or an override
    is wrong, or rows are missing.
    """
    for variant in config.variants():
        _check(config, variant)
    _check_figures(config)
    grid = _Grid(config)
    file = config.output / "metrics.json"
    runs: dict[str, dict[str, Any]] = read_json(file)["runs"] if file.exists() else {}
    jobs = {grid.key(variant, seed): (variant, seed) for seed in config.seeds for variant in config.variants()}

    def one(number: int, key: str, variant: Variant, seed: int) -> dict[str, Any]:
        report(f"{number}/{len(jobs)} {variant.name}, seed {seed}")
        try:
            return _measure(grid, variant, seed, config.output / "runs" / key, report)
        except Exception as error:
            # Whatever one run stumbles over, a full disk included, is no reason to drop the others.
            said = str(error) if isinstance(error, HaechiError) else f"{type(error).__name__}: {error}"
            report(f"failed: {said}")
            return {"failed": said}

    pool = ThreadPoolExecutor(config.workers)
    try:
        futures = {
            pool.submit(one, number, key, *job): key
            for number, (key, job) in enumerate(jobs.items(), 1)
            if key not in runs or "failed" in runs[key]
        }
        for future in as_completed(futures):
            runs[futures[future]] = future.result()
            _write(grid, runs)
    finally:
        pool.shutdown(cancel_futures=True)
    result = _write(grid, runs)
    report(f"tables in {config.output / 'tables.md'}")
    return result


def _write(grid: _Grid, runs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Show what has been measured so far."""
    config = grid.config
    result: dict[str, Any] = {
        "config": config.model_dump(mode="json"),
        "questions": [_answer(grid, question, runs) for question in config.questions],
        "runs": runs,
    }
    write_json(config.output / "metrics.json", result)
    write_text(config.output / "tables.md", ablation_tables(result))
    ablation_plot(config.output / "ablations.svg", result)
    for question, answer in zip(config.questions, result["questions"], strict=True):
        done = [one for one in answer["variants"] if one["parameters"]]
        if question.curve and done:
            models = [Sized(one["parameters"] / 1e6, one["latency_ms"], one["figures"]) for one in done]
            size_plot(config.output / f"{question.name}.svg", "million parameters", models)
    return result


def _check(config: AblateConfig, variant: Variant) -> None:
    """Load every configuration as the variant changes it, so that a slip is told now and not after hours."""
    if config.curate:
        load_config(CurateConfig, config.curate, config.words(variant, "curate"))
    load_config(TrainConfig, config.train, config.words(variant, "train"))
    load_config(EvaluateConfig, config.evaluate, config.words(variant, "evaluate"))


def _check_figures(config: AblateConfig) -> None:
    measured = {"answers", *RANKING, *scores(np.ones(len(CELLS)))}
    known = {"validation": {*RANKING, "weighted_f1"}}
    for name in load_config(EvaluateConfig, config.evaluate).sets:
        known[name] = measured
    for name in config.figures:
        source, _, figure = name.rpartition(".")
        if source not in known:
            raise ConfigError(f"figures: {name!r} is of neither a set nor 'validation'{did_you_mean(source, known)}")
        if figure not in known[source]:
            raise ConfigError(f"figures: {name!r} is not measured{did_you_mean(figure, known[source])}")


class _Grid:
    """The runs of a configuration, each known by everything that decides it: settings, overrides, seed, data."""

    def __init__(self, config: AblateConfig) -> None:
        self.config = config
        paths = {"curate": config.curate, "train": config.train, "evaluate": config.evaluate}
        self._bases = {verb: read_yaml(path) for verb, path in paths.items() if path is not None}
        self._data = self._digests()
        self.curating = Lock()
        """Variants may share their rows: only one is to make them."""

    def key(self, variant: Variant, seed: int) -> str:
        """What one run is known by."""
        words = [self.config.words(variant, verb) for verb in ("curate", "train", "evaluate")]
        return fingerprint(self._bases, words, seed, self._data)

    def _digests(self) -> dict[str, str | None]:
        """Content hashes of the sets and rows that are read."""
        names = [*load_config(EvaluateConfig, self.config.evaluate).sets]
        made = None
        if self.config.curate:
            curation = load_config(CurateConfig, self.config.curate)
            names += [source.set for source in curation.sources]
            made = curation.output
        files = {name: set_file(name) for name in names}
        digests = {name: None if file is None else digest(file) for name, file in files.items()}
        for stage in load_config(TrainConfig, self.config.train).stages:
            if stage.rows is not None and stage.rows != made:
                rows = stage.rows / "train.jsonl"
                if not rows.is_file():
                    raise DataError(f"{rows} does not exist: make it with 'haechi curate CONFIG'")
                digests[str(rows)] = digest(rows)
        return digests


def _measure(grid: _Grid, variant: Variant, seed: int, folder: Path, report: Callable[[str], None]) -> dict[str, Any]:
    """Curate, train, export and evaluate one variant; its weights are dropped, verdicts and figures stay."""
    config, log = grid.config, folder / "log.txt"
    folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    rows: list[str] = []
    if config.curate:
        with grid.curating:
            rows = _rows(config, variant, log)
    model, exported = folder / "train" / "model", folder / "model"
    verb = partial(_verb, log, config.workers)
    verb("train", config.train, *config.words(variant, "train"), *rows, f"seed={seed}", f"output={folder / 'train'}")
    verb("export", model, exported, "--precision", config.precision)
    verb(
        "evaluate",
        config.evaluate,
        *config.words(variant, "evaluate"),
        f'guards=["slm:{exported}"]',
        f"output={folder / 'evaluate'}",
    )
    (evaluated,) = read_json(folder / "evaluate" / "metrics.json")["guards"].values()
    figures = {name: _figure(name, evaluated, exported) for name in config.figures}
    result = {
        "figures": figures,
        "parameters": _parameters(model),
        "latency_ms": _latency(exported),
        "bytes": sum(file.stat().st_size for file in exported.glob("*.onnx")),
        "minutes": (time.monotonic() - started) / 60,
    }
    for part in (folder / "train", exported):
        shutil.rmtree(part)
    report("  ".join(f"{name} {value:.3f}" for name, value in figures.items() if value is not None))
    return result


def _rows(config: AblateConfig, variant: Variant, log: Path) -> list[str]:
    """Curate the variant's rows unless another variant has; the overrides that make the training read them."""
    assert config.curate
    standard = load_config(CurateConfig, config.curate).output
    folder = config.output / "rows" / fingerprint(read_yaml(config.curate), config.words(variant, "curate"))
    if not (folder / "manifest.json").exists():
        _verb(log, 1, "curate", config.curate, *config.words(variant, "curate"), f"output={folder}")
    stages = load_config(TrainConfig, config.train, config.words(variant, "train")).stages
    return [f"stages.{number}.rows={folder}" for number, stage in enumerate(stages) if stage.rows == standard]


def _verb(log: Path, workers: int, *words: object) -> None:
    """Run `haechi WORDS`; what it says goes to the log. Raises HaechiError with its last line when it fails."""
    with log.open("a", encoding="utf-8") as file:
        file.write(f"$ haechi {' '.join(map(str, words))}\n")
        file.flush()
        command = [sys.executable, "-m", "haechi.cli", *map(str, words)]
        cores = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // workers))} if workers > 1 else {}
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env={**cores, **os.environ}).returncode
    if code:
        said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1]
        raise HaechiError(f"{words[0]} ended with code {code}: {said[:200]} (see {log})")


def _figure(name: str, evaluated: Mapping[str, Any], model: Path) -> float | None:
    """A column's value; None where it does not exist, such as the AUROC of a model that gives no verdicts."""
    source, _, figure = name.rpartition(".")
    if source == "validation":
        sheet = read_sheet(model)
        known = {**sheet.metrics.get("calibration", {}), "weighted_f1": sheet.points[DEFAULT_POINT].weighted_f1}
        value = known.get(figure)
    elif figure == "answers":
        value = evaluated["answers"].get(f"{source} forced", {}).get("passed")
    else:
        value = evaluated["sets"].get(source, {}).get(figure)
    return None if value is None else float(value)


def _parameters(model: Path) -> int:
    """Weights of the model, a table that is input and output counted once."""
    from safetensors import safe_open

    with safe_open(model / "model.safetensors", framework="np") as file:
        names: list[str] = list(file.keys())
        return sum(int(np.prod(file.get_slice(name).get_shape())) for name in names)


def _latency(model: Path) -> float:
    """Median milliseconds of a verdict on one query of 30 tokens, one thread."""
    guard = load(model, threads=1)
    text = "how do people usually find a good place to repair an old car in this town " * 4
    query = guard.template.decode(guard.template.encode(text)[:30])
    times = []
    for _ in range(_LATENCY_QUERIES):
        started = time.perf_counter()
        guard.check([query])
        times.append(time.perf_counter() - started)
    return float(np.median(times) * 1000)


def _answer(grid: _Grid, question: Question, measured: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """A question's variants with their figures: per seed, mean, interval, and paired difference to the first."""
    rows: list[dict[str, Any]] = []
    for variant in question.variants:
        runs = [measured.get(grid.key(variant, seed)) for seed in grid.config.seeds]
        failed = [str(one["failed"]) for one in runs if one and "failed" in one]
        done = [one for one in runs if one and "failed" not in one]
        row: dict[str, Any] = {"name": variant.name, "failed": failed, "missing": runs.count(None), "figures": {}}
        for key in ("parameters", "latency_ms", "bytes", "minutes"):
            row[key] = float(np.mean([one[key] for one in done])) if done else None
        for name in grid.config.figures:
            values = [None if one is None or "failed" in one else one["figures"][name] for one in runs]
            first = rows[0]["figures"][name]["values"] if rows else values
            pairs = [(ours - theirs) for ours, theirs in zip(values, first, strict=True) if None not in (ours, theirs)]
            row["figures"][name] = {
                "values": values,
                **interval([value for value in values if value is not None]),
                "difference": interval(pairs) if rows else None,
            }
        rows.append(row)
    return {"name": question.name, "text": question.text, "variants": rows}


def interval(values: Sequence[float]) -> dict[str, float | None]:
    """Mean and half the width of its 95% t-interval over seeds; None where there are too few."""
    from scipy.stats import t

    if not values:
        return {"mean": None, "half": None}
    count = len(values)
    half = float(t.ppf(0.975, count - 1) * np.std(values, ddof=1) / np.sqrt(count)) if count > 1 else None
    return {"mean": float(np.mean(values)), "half": half}
