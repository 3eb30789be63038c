"""The policy: categories of harm from a YAML file, overlaid by a user's own file; the content hash is its version."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import Field

from haechi.config import Config, parse, read_yaml
from haechi.errors import ConfigError, did_you_mean

Text = dict[str, str]
"""A text per language code."""

_CODE = re.compile(r"[a-z][a-z0-9_]*")
_RESERVED = {"pred", "expl", "safe", "unsafe", "harm"}


class Resource(Config):
    """A real help line or public agency."""

    name: Text
    """Its name per language."""
    phone: tuple[str, ...] = ()
    """Numbers as printed, any of which may stand in an answer."""
    url: str | None = None
    """Its page, if it has one."""


class Category(Config):
    """One kind of harm."""

    code: str
    """Snake-case name: the API's name and the special token `<|code|>`."""
    group: str
    """Which of the taxonomy's groups it belongs to."""
    name: Text
    """Short title per language."""
    definition: Text
    """What falls under it, per language."""
    examples: dict[str, tuple[str, ...]]
    """Harmful queries per language."""
    urgent: bool = False
    """Lives are at risk: where this category is at all likely, an answer that names no contact gets the first resource
    of its locale appended."""
    resources: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """Per locale, ids of `Taxonomy.resources`, most relevant first."""


class Taxonomy(Config):
    """A complete policy."""

    name: str
    """What the policy is called."""
    languages: tuple[str, ...]
    """Codes every name, definition and example must cover."""
    groups: dict[str, Text]
    """Group id -> title per language."""
    resources: dict[str, dict[str, Resource]] = Field(default_factory=dict)
    """Locale -> id -> help line."""
    categories: tuple[Category, ...]
    """In the order of the model's category tokens."""

    @property
    def version(self) -> str:
        """First 12 hex digits of the SHA-256 of the content: equal content, equal version."""
        canonical = json.dumps(self.model_dump(mode="json"), ensure_ascii=False, sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()[:12]

    @property
    def codes(self) -> tuple[str, ...]:
        """The category codes, in order."""
        return tuple(category.code for category in self.categories)

    def __getitem__(self, code: str) -> Category:
        """The category of that code. Raises ConfigError with a suggestion when there is none."""
        for category in self.categories:
            if category.code == code:
                return category
        raise ConfigError(f"unknown category {code!r}{did_you_mean(code, self.codes)}")

    def contacts(self, locale: str) -> dict[str, set[str]]:
        """Every phone number and link that an answer for `locale` may show, with the acronyms, in lower case, in the
        names of those it belongs to."""
        owners: dict[str, set[str]] = {}
        for item in self.resources.get(locale, {}).values():
            acronyms = {found.lower() for name in item.name.values() for found in re.findall(r"[A-Z]{3,}", name)}
            for contact in (*item.phone, *([item.url] if item.url else [])):
                owners.setdefault(contact, set()).update(acronyms)
        return owners

    def help_line(self, code: str, locale: str) -> Resource | None:
        """The most relevant help line of a category in a locale, if it has one."""
        ids = self[code].resources.get(locale, ())
        return self.resources[locale][ids[0]] if ids else None


def load_taxonomy(path: Path | None = None) -> Taxonomy:
    """The built-in policy, or the one in `path`: complete, or with `extends: default` an overlay of the built-in one.

    An overlay may `drop: [code]`, `rename: {old: new}`, and list categories, groups, resources and languages whose keys
    replace or extend those of the same name. Raises ConfigError in one line for any mistake.
    """
    if path is None:
        return _default()
    tree = read_yaml(path)
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold a mapping with a name, languages, groups and categories")
    base = tree.pop("extends", None)
    if base is None:
        return validate(tree, str(path))
    if base != "default":
        raise ConfigError(f"{path}: extends must be 'default', not {base!r}")
    return validate(_overlay(_default().model_dump(mode="json"), tree, str(path)), str(path))


@cache
def _default() -> Taxonomy:
    with resources.as_file(resources.files("haechi") / "data" / "taxonomy.yaml") as path:
        return validate(read_yaml(path), "the built-in taxonomy")


def validate(tree: Mapping[str, Any], where: str) -> Taxonomy:
    """A checked taxonomy from plain data. Raises ConfigError naming `where` and the first inconsistency."""
    taxonomy = parse(Taxonomy, tree, where)
    if not taxonomy.categories:
        raise ConfigError(f"{where}: there must be at least one category")
    if not taxonomy.languages:
        raise ConfigError(f"{where}: there must be at least one language")
    seen: set[str] = set()
    for category in taxonomy.categories:
        _check_category(taxonomy, category, where)
        if category.code in seen:
            raise ConfigError(f"{where}: category code {category.code!r} appears twice")
        seen.add(category.code)
    for group, title in taxonomy.groups.items():
        _require_languages(taxonomy, title, f"{where}: group {group!r}")
    return taxonomy


def _check_category(taxonomy: Taxonomy, category: Category, where: str) -> None:
    here = f"{where}: category {category.code!r}"
    if not _CODE.fullmatch(category.code):
        raise ConfigError(f"{here}: a code is lower-case letters, digits and underscores, and starts with a letter")
    if category.code in _RESERVED:
        raise ConfigError(f"{here}: this code is the name of one of the model's own tokens; choose another")
    if category.group not in taxonomy.groups:
        raise ConfigError(f"{here}: unknown group {category.group!r}{did_you_mean(category.group, taxonomy.groups)}")
    for field in ("name", "definition", "examples"):
        _require_languages(taxonomy, getattr(category, field), f"{here}: {field}")
    for locale, ids in category.resources.items():
        known = taxonomy.resources.get(locale, {})
        for id in ids:
            if id not in known:
                raise ConfigError(f"{here}: unknown resource {id!r} in locale {locale!r}{did_you_mean(id, known)}")


def _require_languages(taxonomy: Taxonomy, texts: Mapping[str, object], where: str) -> None:
    for language in taxonomy.languages:
        if not texts.get(language):
            raise ConfigError(f"{where} lacks a text in language {language!r}")


def _overlay(base: dict[str, Any], tree: dict[str, Any], where: str) -> dict[str, Any]:
    """`base` changed as an overlay file says; the result is validated by the caller."""
    categories: dict[str, Any] = {category["code"]: category for category in base["categories"]}
    drop, rename, listed_categories = (tree.pop(key, None) for key in ("drop", "rename", "categories"))
    for key, value, kind, form in (
        ("drop", drop, list, "a list of codes"),
        ("rename", rename, dict, "a mapping of old codes to new ones"),
        ("categories", listed_categories, list, "a list"),
    ):
        if value is not None and not isinstance(value, kind):
            raise ConfigError(f"{where}: {key} must be {form}, not {value!r}")
    for code in drop or []:
        if categories.pop(code, None) is None:
            raise ConfigError(f"{where}: cannot drop unknown category {code!r}{did_you_mean(code, categories)}")
    for old, new in (rename or {}).items():
        if old not in categories:
            raise ConfigError(f"{where}: cannot rename unknown category {old!r}{did_you_mean(old, categories)}")
        if new in categories:
            raise ConfigError(f"{where}: cannot rename {old!r} to {new!r}: that category exists already")
        categories = {
            (new if code == old else code): {**category, "code": new if code == old else code}
            for code, category in categories.items()
        }
    listed: set[str] = set()
    for category in listed_categories or []:
        code = category.get("code") if isinstance(category, dict) else None
        if not isinstance(code, str):
            raise ConfigError(f"{where}: each listed category needs a code")
        if code in listed:
            raise ConfigError(f"{where}: category code {code!r} appears twice")
        listed.add(code)
        categories[code] = _merge(categories.get(code, {}), category)
    return {
        **_merge({key: value for key, value in base.items() if key != "categories"}, tree),
        "categories": list(categories.values()),
    }


def _merge(old: Any, new: Any) -> Any:
    """Mappings are merged key by key, anything else is replaced."""
    if isinstance(old, dict) and isinstance(new, dict):
        return {**old, **{key: _merge(old.get(key), value) for key, value in new.items()}}
    return new
