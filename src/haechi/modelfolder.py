"""`haechi.json`, the sheet that turns a Hugging Face model folder into a guard: policy, template, operating point."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any, Self

from pydantic import Field, ValidationError, model_validator

from haechi.errors import DataError, ModelError
from haechi.schema import Record
from haechi.store import digest, read_json, write_json
from haechi.taxonomy import Taxonomy, validate
from haechi.template import TemplateSettings

SHEET = "haechi.json"
FORMAT = 2
DEFAULT_POINT = "balanced"
EMBEDDED = "haechi-mini"
"""The model inside the package."""
_SEALED = ("tokenizer.json", "words.txt", "*.onnx", "*.safetensors")


def default_model() -> Path:
    """The folder of the embedded model."""
    return Path(str(resources.files("haechi") / "data" / EMBEDDED))


class Point(Record):
    """Where a score begins to be unsafe, and what that means on the rows it was fitted on."""

    threshold: float = Field(ge=0, le=1)
    """A calibrated score at or above it is unsafe."""
    categories: dict[str, float] = Field(default_factory=dict)
    """Thresholds of their own for queries whose likeliest category is one of these."""
    precision: float | None = None
    """Share of unsafe rows among those called unsafe."""
    recall: float | None = None
    """Share of the unsafe rows that are called unsafe."""
    false_alarms: float | None = None
    """Share of the safe rows that are called unsafe."""
    weighted_f1: float | None = None
    """F1 of both labels, weighted by their rows."""


class Sheet(Record):
    """Everything a guard needs beside weights and tokenizer."""

    format: int = FORMAT
    """Version of this file's layout."""
    name: str
    """What the model is called."""
    base: str
    """The model it started from."""
    taxonomy: dict[str, Any]
    """Snapshot of the policy it was trained for."""
    taxonomy_version: str
    """Content hash of that policy."""
    template: TemplateSettings
    """How it reads."""
    casing: dict[str, str] | None = None
    """Usual forms of words for a model that writes in lower case (`haechi.casing`); None for models that know case."""
    precision: str = "fp32"
    """Number format of the weights."""
    temperature: float = Field(default=1.0, gt=0)
    """Divides the label logits; fitted on validation rows."""
    points: dict[str, Point] = Field(default_factory=lambda: {DEFAULT_POINT: Point(threshold=0.5)})
    """Operating points by name, `balanced` among them: the one that is used when none is asked for."""
    files: dict[str, str] = Field(default_factory=dict)
    """SHA-256 of the files the model is read from, by name."""
    trained_on: dict[str, Any] = Field(default_factory=dict)
    """Per stage the data and its content hashes."""
    metrics: dict[str, Any] = Field(default_factory=dict)
    """What validation measured."""

    @model_validator(mode="after")
    def _has_a_default_point(self) -> Self:
        if DEFAULT_POINT not in self.points:
            raise ValueError(f"no point {DEFAULT_POINT!r}")
        return self

    def policy(self) -> Taxonomy:
        """The snapshot as a taxonomy. Raises ModelError when its content does not have its stated version."""
        taxonomy = validate(self.taxonomy, f"the taxonomy inside model {self.name!r}")
        if taxonomy.version != self.taxonomy_version:
            raise ModelError(
                f"model {self.name!r} says taxonomy {self.taxonomy_version} but holds {taxonomy.version}: "
                f"its {SHEET} was edited; export or train it again"
            )
        return taxonomy


def read_sheet(folder: Path) -> Sheet:
    """The sheet of a model folder. Raises ModelError in one line for anything missing, truncated or unknown."""
    if not folder.is_dir():
        raise ModelError(f"no model folder {folder}")
    try:
        tree = read_json(folder / SHEET)
    except DataError as error:
        raise ModelError(f"{folder} is not a Haechi model: {error}") from None
    if not isinstance(tree, dict) or tree.get("format") != FORMAT:
        raise ModelError(
            f"{folder / SHEET} has format {tree.get('format') if isinstance(tree, dict) else None!r}; "
            f"this version reads format {FORMAT}"
        )
    try:
        return Sheet(**tree)
    except ValidationError as error:
        first = error.errors()[0]
        raise ModelError(f"{folder / SHEET}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def write_sheet(folder: Path, sheet: Sheet) -> None:
    """Write the sheet of a model folder, atomically."""
    write_json(folder / SHEET, sheet.model_dump(mode="json"))


def sealed(folder: Path, sheet: Sheet) -> Sheet:
    """The sheet with the hashes of the tokenizer, words and weights that now lie in `folder`."""
    files = sorted(file for pattern in _SEALED for file in folder.glob(pattern))
    return sheet.model_copy(update={"files": {file.name: digest(file) for file in files}})


def require_seal(folder: Path, sheet: Sheet) -> None:
    """Raise ModelError when a file in `folder` is missing or another than the sheet was written for.

    Weights in safetensors are not read twice: of a large model that would take longer than loading it.
    """
    for name, known in sheet.files.items():
        file = folder / name
        if not file.is_file():
            raise ModelError(f"{file} is missing: the model folder is incomplete, copy or export it again")
        if file.suffix != ".safetensors" and digest(file) != known:
            raise ModelError(f"{file} is truncated or belongs to another model: copy or export the folder again")


def require_policy(sheet: Sheet, taxonomy: Taxonomy) -> None:
    """Raise ModelError unless the model was trained for exactly this policy."""
    if taxonomy.version != sheet.taxonomy_version:
        differing = sorted(set(taxonomy.codes) ^ set(sheet.policy().codes))
        detail = f" (categories that differ: {', '.join(differing)})" if differing else ""
        raise ModelError(
            f"model {sheet.name!r} was trained for taxonomy {sheet.taxonomy_version}, not {taxonomy.version}{detail}: "
            "train it for this policy or drop the taxonomy option"
        )
