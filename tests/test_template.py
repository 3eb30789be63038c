"""Who sees whom, which ids are supervised, and that no user text can pose as a special token."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from haechi.engines import load_engine
from haechi.errors import ModelError
from haechi.guards.slm import load
from haechi.modelfolder import read_sheet
from haechi.schema import Example
from haechi.taxonomy import load_taxonomy
from haechi.template import IGNORE, TOKENS, Row, Template, pack, separate, special_tokens, visible
from haechi.train.config import Stage
from haechi.train.data import render


@pytest.fixture(scope="module")
def template(trained: Path) -> Template:
    return load(trained, engine="torch").template


def row(template: Template, **changes: object) -> Row:
    example = Example(
        id="1",
        lang="en",
        query="how do I steal a car",
        label="unsafe",
        category="crime_advice",
        response="I will not help with that.",
    ).model_copy(update=changes)
    return render(example, Stage(name="s", rows=Path("x"), lr=1.0), template, force=True)


def test_supervised_ids_are_exactly_verdict_category_answer_and_end(template: Template) -> None:
    name = template.id
    batch = pack([row(template)])
    supervised = batch.labels[batch.labels != IGNORE].tolist()
    answer = template.encode("I will not help with that.")
    assert supervised == [name("<|unsafe|>"), name("<|crime_advice|>"), *answer, template.eos, *answer, template.eos]
    inputs = batch.ids[batch.labels != IGNORE].tolist()
    assert inputs == [name("<|pred|>"), name("<|unsafe|>"), name("<|expl|>"), *answer, name("<|expl|>"), *answer]
    harm = batch.ids[0].tolist().index(name("<|harm|>"))
    assert batch.labels[0, harm] == IGNORE and batch.ids[0, harm + 1] == name("<|expl|>")


def test_a_safe_row_is_taught_safe_and_no_category_and_never_forced(template: Template) -> None:
    classify, *others = row(template, label="safe").branches
    assert (classify.ids, classify.labels) == ([template.id("<|pred|>")], [template.id("<|safe|>")])
    assert len(others) == 1 and template.id("<|harm|>") not in others[0].ids


def test_an_answer_that_is_cut_does_not_teach_to_end_there(template: Template) -> None:
    longest = template.settings.answer
    whole, cut = (template.answer_branch("car " * words) for words in (longest - 1, longest + 9))
    assert whole.labels[-1] == template.eos and len(whole.ids) == len(cut.ids) == longest
    assert template.eos not in cut.labels


def test_an_unknown_category_teaches_only_the_verdict(template: Template) -> None:
    assert row(template, category="violence").branches[0].labels == [template.id("<|unsafe|>")]


@pytest.mark.parametrize("attention", ["causal", "prefix"])
def test_branches_see_the_query_and_themselves_only(template: Template, attention: str) -> None:
    segments = pack([row(template), row(template, query="you")]).segments
    seen = visible(segments, attention)
    for index in range(len(segments)):
        for seer, target in np.ndindex(seen.shape[1:]):
            mine, its = segments[index, seer], segments[index, target]
            if seer == target:
                expected = True
            elif 0 in (mine, its):
                expected = False
            elif mine == its == 1:
                expected = attention == "prefix" or target < seer
            else:
                expected = its == 1 < mine or (mine == its and target < seer)
            assert seen[index, seer, target] == expected


@pytest.mark.parametrize("attention", ["causal", "prefix"])
def test_a_branch_gets_the_same_logits_in_a_shared_row_as_alone(
    trained: Path, llama_base: Path, attention: str
) -> None:
    template = load(trained, engine="torch").template
    shared = [row(template), row(template, query="thank you", label="safe")]
    for folder in (trained, llama_base):
        engine = load_engine(folder, "torch")
        together, apart = [], []
        for found, rows in ((together, shared), (apart, separate(shared))):
            batch = pack(rows)
            logits = engine.forward(
                batch.ids % 500, batch.positions, visible(batch.segments, attention), np.arange(batch.ids.shape[1])
            ).logits
            found += list(logits[batch.labels != IGNORE])
        np.testing.assert_allclose(np.array(together), np.array(apart), atol=1e-4)


SPECIAL = [*special_tokens(load_taxonomy().codes), "[SEP]", "[CLS]", "[PAD]"]


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(parts=st.lists(st.one_of(st.sampled_from(SPECIAL), st.text(), st.sampled_from([t.upper() for t in TOKENS]))))
def test_user_text_never_becomes_a_special_token(template: Template, parts: list[str]) -> None:
    text = "".join(parts)
    special = {template.id(token) for token in SPECIAL}
    assert not special & set(template.encode(text))
    rendered = row(template, query=text, response=text)
    assert not special & set(rendered.query[1:])
    # Whatever the query spells, a row still has exactly one verdict to teach, at the position that is read.
    batch = pack([rendered])
    assert batch.ids[0, batch.split] == template.id("<|pred|>")
    assert (batch.ids == template.id("<|pred|>")).sum() == 1


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(length=st.integers(0, 400))
def test_windows_cover_every_token_and_overlap(template: Template, length: int) -> None:
    query = " ".join(["car", "you", "her"][index % 3] for index in range(length))
    ids, windows = template.encode(query), [window[1:] for window in template.windows(query)]
    size, overlap = template.settings.window, template.settings.overlap
    assert all(len(window) <= size for window in windows)
    joined = windows[0] + [token for window in windows[1:] for token in window[overlap:]]
    assert joined == ids


def test_a_tokenizer_of_another_taxonomy_is_refused(trained: Path) -> None:
    sheet, tokenizer = read_sheet(trained), Tokenizer.from_file(str(trained / "tokenizer.json"))
    with pytest.raises(ModelError, match=r"lacks the tokens <\|fraud\|>"):
        Template(tokenizer, ["crime_advice", "fraud"], sheet.template)
