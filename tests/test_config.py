"""Configurations are strict, helpful, and every shipped one loads."""

from __future__ import annotations

from pathlib import Path

import pytest

from conftest import ROOT
from haechi.ablate import AblateConfig
from haechi.config import load_config
from haechi.curate import CurateConfig
from haechi.errors import ConfigError
from haechi.evaluate import EvaluateConfig
from haechi.review import ReviewConfig
from haechi.train import TrainConfig

KINDS = {
    "train": TrainConfig,
    "curate": CurateConfig,
    "evaluate": EvaluateConfig,
    "ablate": AblateConfig,
    "review": ReviewConfig,
}
SHIPPED = [path for path in sorted((ROOT / "configs").glob("*/*.yaml")) if path.parent.name in KINDS]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_shipped_configuration_loads(path: Path) -> None:
    load_config(KINDS[path.parent.name], path)


START = ROOT / "configs" / "train" / "start.yaml"


def test_overrides_reach_into_lists_and_keep_types() -> None:
    config = load_config(TrainConfig, START, ["seed=7", "stages.0.lr=0.001", "prompt.attention=causal"])
    assert (config.seed, config.stages[0].lr, config.prompt.attention) == (7, 0.001, "causal")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sead=1", "unknown key 'sead'; did you mean 'seed'?"),
        ("stages.0.lrr=1", "did you mean 'lr'?"),
        ("seed=high", "seed: Input should be a valid integer"),
        ("stages.0.epochs=2.5", "valid integer"),
        ("prompt.overlap=999", "overlap must be smaller than window"),
        ("stages.9.lr=1", "is not a section"),
        ("seed", "must look like key=value"),
        ("stages.1.rows=null", "stages.1: stage 'instruction' needs text or rows"),
        ("stages.0.vocabulary_sample=9", "must hold the targets"),
    ],
)
def test_a_wrong_key_or_type_is_one_line_that_names_it(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(TrainConfig, START, [override])
    told = str(caught.value)
    assert message in told and "\n" not in told and told.count("stages") <= 1


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load_config(TrainConfig, tmp_path / "none.yaml")
