"""The built-in policy is whole; a user's overlay works; every mistake is one clear line."""

from __future__ import annotations

from pathlib import Path

import pytest

from haechi.errors import ConfigError
from haechi.taxonomy import load_taxonomy


def overlay(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "policy.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_built_in_policy_has_the_papers_groups_and_categories() -> None:
    policy = load_taxonomy()
    groups = [category.group for category in policy.categories]
    assert len(policy.codes) == 10 and [groups.count(group) for group in policy.groups] == [3, 4, 3]
    for category in policy.categories:
        assert {"US", "KR"} <= set(category.resources) and all(category.resources.values()), category.code
    assert "988" in policy.contacts("US") and "109" in policy.contacts("KR")
    assert policy["self_harm_suicide"].urgent


def test_an_overlay_adds_drops_renames_and_changes(tmp_path: Path) -> None:
    path = overlay(
        tmp_path,
        """
extends: default
name: shop
drop: [uncertain_prediction]
rename: {insult_offensiveness: abuse}
resources: {US: {desk: {name: {en: Trust desk, ko: 신뢰 센터}, phone: ["555-0100"]}}}
categories:
  - {code: crime_advice, name: {en: Crime}, resources: {US: [desk]}}
  - {code: counterfeit, group: legal, name: {en: Fakes, ko: 위조품}, definition: {en: Fake goods., ko: 위조 상품.},
     examples: {en: [where do I buy fakes], ko: [짝퉁 어디서 사]}}
""",
    )
    policy = load_taxonomy(path)
    assert policy.codes[-1] == "counterfeit" and "uncertain_prediction" not in policy.codes
    assert policy["abuse"].definition == load_taxonomy()["insult_offensiveness"].definition
    assert policy["crime_advice"].name == {**load_taxonomy()["crime_advice"].name, "en": "Crime"}
    assert policy.help_line("crime_advice", "US") == policy.resources["US"]["desk"]
    assert policy.version != load_taxonomy().version == load_taxonomy().version


ONE = "code: x, group: legal, name: {en: X, ko: 엑스}, definition: {en: d, ko: d}, examples: {en: [e], ko: [e]}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("extends: default\ncategories: [{%s}, {%s}]" % (ONE, ONE), "category code 'x' appears twice"),
        ("extends: default\ncategories: [{code: x, group: legal, name: {en: X}, definition: {en: d, ko: d}, "
         "examples: {en: [e], ko: [e]}}]", "category 'x': name lacks a text in language 'ko'"),
        ("extends: default\ncategories: [{%s, examplse: {}}]" % ONE, "did you mean 'examples'"),
        ("extends: default\ndrop: [crime_advise]", "did you mean 'crime_advice'"),
        ("extends: default\nrename: {crime_advice: self_harm_suicide}", "exists already"),
        ("extends: default\ncategories: [{%s}]" % ONE.replace("legal", "leagl"), "did you mean 'legal'"),
        ("extends: default\ncategories: [{%s}]" % ONE.replace("code: x", "code: Fraud!"), "lower-case letters"),
        ("extends: default\ncategories: [{%s}]" % ONE.replace("code: x", "code: harm"), "model's own tokens"),
        ("extends: default\ncategories: [{%s, resources: {US: [nobody]}}]" % ONE, "unknown resource 'nobody'"),
        ("extends: default\ndrop: 5", "drop must be a list of codes, not 5"),
        ("extends: default\nrename: [x]", "rename must be a mapping"),
        ("extends: mine", "extends must be 'default'"),
        ("name: [", "not valid YAML"),
        ("- a", "must hold a mapping"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_clear_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_taxonomy(overlay(tmp_path, text))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_equal_content_has_equal_version_however_it_is_written(tmp_path: Path) -> None:
    first = load_taxonomy(overlay(tmp_path, "extends: default\nname: a"))
    second = load_taxonomy(overlay(tmp_path, "# a comment\nname:   'a'\nextends:   default"))
    assert first.version == second.version
