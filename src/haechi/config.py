"""A YAML file and `key=value` words become one strict pydantic object; a misspelt key gets a suggestion."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from haechi.errors import ConfigError, did_you_mean


class Config(BaseModel):
    """Base of every configuration: frozen, unknown keys refused, no silent conversion between types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


C = TypeVar("C", bound=BaseModel)


def read_yaml(path: Path) -> Any:
    """The parsed YAML of `path`. Raises ConfigError when it is missing, not UTF-8 or not YAML."""
    try:
        return parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except FileNotFoundError:
        raise ConfigError(f"no such file: {path}") from None
    except IsADirectoryError:
        raise ConfigError(f"{path} is a folder; name a YAML file") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not UTF-8 text") from None
    except ValueError:
        raise ConfigError(f"{str(path)!r} is no file name") from None
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None


def parse_yaml(text: str, where: str) -> Any:
    """The value of a YAML text. Raises ConfigError naming `where` it stood."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ConfigError(f"{where} is nested too deeply") from None


def load_config(kind: type[C], path: Path, overrides: Sequence[str] = ()) -> C:
    """Read `path` as `kind`, after setting each `dotted.key=value` of `overrides` (values are YAML).

    Raises ConfigError with the file, the key and a suggestion for a misspelt key.
    """
    tree = read_yaml(path)
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold a mapping of settings")
    for word in overrides:
        _set(tree, word)
    return parse(kind, tree, str(path))


def parse(kind: type[C], tree: Mapping[str, Any], where: str) -> C:
    """Validate `tree` as `kind`; every problem is folded into one ConfigError line that names `where`."""
    try:
        # YAML has neither tuples nor paths; strict JSON mode accepts their plain forms and converts nothing else.
        return kind.model_validate_json(json.dumps(tree, default=str))
    except ValidationError as error:
        # A section that is refused takes the one around it along, which says nothing new.
        around = {item["loc"][:depth] for item in error.errors() for depth in range(len(item["loc"]))}
        told = [_describe(kind, item) for item in error.errors() if item["loc"] not in around]
        raise ConfigError(f"{where}: {'; '.join(told)}") from None


def _describe(kind: type[BaseModel], item: Any) -> str:
    location = [str(part) for part in item["loc"]]
    key = ".".join(location)
    if item["type"] == "extra_forbidden":
        return f"unknown key {key!r}{did_you_mean(location[-1], _fields(kind, item['loc'][:-1]))}"
    if item["type"] == "missing":
        return f"key {key!r} is missing"
    message = item["msg"].removeprefix("Value error, ")
    return f"{key}: {message}" if key else message


def _fields(kind: Any, location: Sequence[int | str]) -> list[str]:
    """The field names of the model found by walking `location` down from `kind`."""
    models = [kind]
    for part in location:
        if isinstance(part, int):
            continue
        models = [
            inner
            for model in models
            if part in model.model_fields
            for inner in _models(model.model_fields[part].annotation)
        ] or models
    return [name for model in models for name in model.model_fields]


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in get_args(annotation) for model in _models(inner)]


def _set(tree: dict[str, Any], word: str) -> None:
    key, equals, value = word.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {word!r} must look like key=value")
    node: Any = tree
    *parents, last = key.split(".")
    for part in parents:
        node = (
            node[int(part)]
            if isinstance(node, list) and part.isdigit() and int(part) < len(node)
            else (node.setdefault(part, {}) if isinstance(node, dict) else None)
        )
        if not isinstance(node, dict | list):
            raise ConfigError(f"override {word!r}: {part!r} is not a section")
    parsed = parse_yaml(value, f"override {word!r}: the value")
    if isinstance(node, list):
        if not last.isdigit() or int(last) >= len(node):
            raise ConfigError(f"override {word!r}: there is no item {last!r}")
        node[int(last)] = parsed
    else:
        node[last] = parsed
