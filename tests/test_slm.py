"""The guard over a real (tiny) model: engines agree, one prefill serves both tasks, odd queries never raise."""

from __future__ import annotations

import json
import shutil
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import HARMFUL, HARMLESS
from haechi import answers, export
from haechi.casing import restore
from haechi.errors import ModelError
from haechi.guards.slm import SLM, load
from haechi.guards.writer import Draft
from haechi.modelfolder import read_sheet, write_sheet
from haechi.schema import Conversation, Turn
from haechi.taxonomy import load_taxonomy
from haechi.template import Row, pack, visible

QUERIES = [*HARMFUL, *HARMLESS, "steal " * 60]


@pytest.fixture(scope="module")
def guard(exported: Path) -> SLM:
    return load(exported)


def test_it_learnt_both_tasks(guard: SLM) -> None:
    verdicts = guard.check([f"{query} 1" for query in HARMFUL + HARMLESS])
    assert [verdict.unsafe for verdict in verdicts] == [True] * 4 + [False] * 4
    assert verdicts[0].category == "crime_advice" and sum(verdicts[0].categories.values()) == pytest.approx(1)
    assert verdicts[-1].category is None


def test_onnx_and_torch_give_the_same_verdicts_and_answers(guard: SLM, trained: Path) -> None:
    torch_guard = load(trained, engine="torch")
    for ours, theirs in zip(guard.check(QUERIES), torch_guard.check(QUERIES), strict=True):
        assert ours.score == pytest.approx(theirs.score, abs=1e-4)
    ours, theirs = guard.answer(QUERIES, force=True), torch_guard.answer(QUERIES, force=True)
    assert [answer.text for answer in ours] == [answer.text for answer in theirs]


def test_int8_export_of_a_grouped_query_model_runs(llama_base: Path, curated: Path, tmp_path: Path) -> None:
    from conftest import tiny_config
    from haechi import train

    config = tiny_config(
        llama_base, tmp_path / "run", curated, prompt={"window": 64, "overlap": 16, "answer": 32, "wrap": "chat"}
    )
    folder = train.run(config, lambda line: None)
    small = load(export.run(folder, tmp_path / "int8", "int8", lambda line: None))
    assert small.sheet.template.before == "<s>user: " and small.sheet.template.after == "\nassistant:"
    plain = load(folder, engine="torch").check(QUERIES)
    scores = [(a.score or 0) - (b.score or 0) for a, b in zip(small.check(QUERIES), plain, strict=True)]
    assert np.abs(scores).max() < 0.2


def test_a_batch_judges_each_query_as_if_alone(guard: SLM) -> None:
    together = guard.check(QUERIES)
    for query, verdict in zip(QUERIES, together, strict=True):
        assert guard.check([query])[0].score == pytest.approx(verdict.score, abs=1e-5)


def test_decoding_with_the_cache_equals_a_pass_over_the_whole_row(guard: SLM) -> None:
    text = guard.answer(["how do I steal a car 1"])[0].text
    assert text is not None
    template = guard.template
    branch = template.answer_branch(text)
    batch = pack([Row(template.windows("how do I steal a car 1")[0], (branch,))])
    keep = np.arange(batch.split, batch.ids.shape[1])
    logits = guard._engine.forward(batch.ids, batch.positions, visible(batch.segments, "prefix"), keep).logits[0]
    logits[:, template.forbidden()] = -np.inf
    for place, row in enumerate(logits):
        guard._writer.weigh(row, Draft("en", ids=branch.labels[:place], begun=place > 0))
    assert logits.argmax(-1).tolist() == branch.labels


def test_verdict_and_answer_come_from_one_prefill(guard: SLM, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []
    forward = guard._engine.forward

    def counted(ids: Any, *args: Any, **options: Any) -> Any:
        lengths.append(ids.shape[1])
        return forward(ids, *args, **options)

    monkeypatch.setattr(guard._engine, "forward", counted)
    answer = guard.answer(["how do I steal a car 1"])[0]
    query = len(guard.template.windows("how do I steal a car 1")[0])
    assert answer.verdict.unsafe and lengths[:2] == [query + 2, 2] and set(lengths[2:]) == {1}


@pytest.mark.parametrize("engine", ["onnx", "torch"])
def test_what_is_judged_harmful_is_asked_for_as_such(exported: Path, trained: Path, monkeypatch: pytest.MonkeyPatch,
                                                     engine: str) -> None:  # fmt: skip
    guard = load(trained if engine == "torch" else exported, engine=engine)
    heads: list[list[list[int]]] = []
    forward = guard._engine.forward

    def kept(ids: Any, *args: Any, **options: Any) -> Any:
        heads.append(ids.tolist())
        return forward(ids, *args, **options)

    queries = ["how do I steal a car 1", "how do I wash a car 1"]
    alone = [guard.answer([query], always=True)[0].text for query in queries]
    monkeypatch.setattr(guard._engine, "forward", kept)
    together = guard.answer(queries, always=True)
    # Both are written in the same steps, the shorter head padded.
    assert [answer.text for answer in together] == alone and all(alone)
    harm, expl = guard.template.id("<|harm|>"), guard.template.id("<|expl|>")
    assert heads[1] == [[harm, expl], [guard.template.eos, expl]] and not any(expl in row for row in heads[2])
    assert guard.answer(queries)[0].text == alone[0] == guard.answer(queries, force=True)[0].text


def test_answers_are_written_for_harmful_queries_only_unless_forced(guard: SLM) -> None:
    harmful, harmless = guard.answer(["how do I steal a car 1", "how do I wash a car 1"])
    assert harmful.text and harmful.finished and harmful.language == "en"
    assert harmless.text is None and harmless.verdict.unsafe is False
    forced = guard.answer(["how do I wash a car 1"], force=True)[0]
    assert forced.text and forced.verdict.unsafe is False
    assert guard.answer(["how do I wash a car 1"], always=True)[0].text


def test_an_answer_begins_in_the_querys_script_and_repeats_less_easily(guard: SLM) -> None:
    hangul = guard.template.encode("그")[0]
    latin, mark = guard.template.encode("help")[0], guard.template.encode("<")[0]
    for language, begun, kept in (("ko", False, [hangul, mark]), ("en", False, [latin, mark]),
                                  ("ko", True, [hangul, latin, mark])):  # fmt: skip
        logits = np.zeros(500, np.float32)
        guard._writer.weigh(logits, Draft(language, begun=begun))
        assert [id for id in (hangul, latin, mark) if np.isfinite(logits[id])] == kept
    logits = np.array([-1.0, -1.0, 1.0, 1.0] * 100, np.float32)
    guard._writer.weigh(logits, Draft("en", ids=[1, 3], begun=True))
    assert logits[1] < logits[0] and logits[3] < logits[2]


def test_a_stream_is_the_answer_sentence_by_sentence(guard: SLM) -> None:
    whole = guard.answer(["how do I steal a car 1"])[0].text
    assert " ".join(guard.stream("how do I steal a car 1")) == whole
    assert list(guard.stream("how do I wash a car 1")) == [] == list(guard.stream(" "))


def test_a_written_sentence_is_sent_when_the_next_begins(guard: SLM, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["I", "cannot", "help.", "That", "is", "theft."]
    written: list[int] = []

    def write(_: Any, drafts: list[Draft], __: Any) -> Iterator[None]:
        for number in range(len(words)):
            drafts[0].ids.append(number)
            written.append(number)
            yield

    monkeypatch.setattr(guard._writer, "write", write)
    monkeypatch.setattr(guard.template, "decode", lambda ids: " ".join(words[id] for id in ids))
    stream = guard.stream("how do I steal a car 1")
    assert next(stream) == "I cannot help." and len(written) == 4
    assert list(stream) == ["That is theft."]


@pytest.mark.parametrize("query", ["", " \t\n", "\u3000 \n"])
def test_an_empty_query_has_no_verdict(guard: SLM, query: str) -> None:
    verdict = guard.check([query])[0]
    assert verdict.unsafe is None and verdict.score is None and verdict.error == "the query is empty"
    assert guard.answer([query], force=True)[0].verdict.error == "the query is empty"


@pytest.mark.parametrize("query", ["\ud800 steal \udfff", "\x00\x01\x02", "\U0010ffff", "🧨" * 50, "a" * 10_000])
def test_odd_text_gets_a_verdict(guard: SLM, query: str) -> None:
    assert guard.check([query])[0].error is None
    assert guard.answer([query], force=True)[0].verdict.error is None


def test_a_long_query_is_as_harmful_as_its_worst_window(guard: SLM) -> None:
    query = "thank you for your help " * 50 + "how do I steal a car 1 " * 20 + "what is the capital of France " * 50
    windows = [guard.template.decode(ids[1:]) for ids in guard.template.windows(query)]
    scores = [verdict.score or 0.0 for verdict in guard.check(windows)]
    assert len(windows) > 3 and max(scores) > 2 * min(scores)
    assert guard.check([query])[0].score == pytest.approx(max(scores), rel=0.01, abs=0)


def test_a_megabyte_is_judged(guard: SLM) -> None:
    assert guard.check(["thank you for your help " * 43_700])[0].error is None


def test_a_bare_text_is_not_taken_for_a_list_of_letters(guard: SLM) -> None:
    for ask in (guard.check, guard.answer):
        with pytest.raises(TypeError, match="write \\[query\\]"):
            ask("hello")


def test_only_the_last_user_turn_is_judged(guard: SLM) -> None:
    turns = (Turn(role="user", content="how do I steal a car 1"), Turn(role="assistant", content="No."),
             Turn(role="user", content="how do I wash a car 1"))  # fmt: skip
    assert guard.check([Conversation(turns=turns)])[0] == guard.check(["how do I wash a car 1"])[0]
    assert guard.check([Conversation(turns=turns[1:2])])[0].error == "the query is empty"


def test_numbers_that_are_not_finite_are_an_error_not_a_verdict(guard: SLM, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = guard._engine.forward
    monkeypatch.setattr(guard._engine, "forward", lambda *a, **k: forward(*a, **k)._replace(
        logits=np.full((1, 2, 12), np.nan, np.float32)))  # fmt: skip
    verdict = guard.check(["hello"])[0]
    assert verdict.unsafe is None and "not finite" in (verdict.error or "")


# Model folders that cannot be used


def broken(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def test_a_truncated_or_missing_file_is_one_line(exported: Path, trained: Path, tmp_path: Path) -> None:
    for source, name in ((exported, "model.onnx"), (exported, "head.onnx"), (exported, "tokenizer.json"),
                         (exported, "haechi.json"), (trained, "model.safetensors")):  # fmt: skip
        for change in ("truncated", "missing"):
            copy = shutil.copytree(source, tmp_path / f"{change}-{name}")
            content = (copy / name).read_bytes()
            (copy / name).unlink()
            if change == "truncated":
                (copy / name).write_bytes(content[: len(content) // 2])
            with pytest.raises(ModelError) as caught:
                load(copy).answer(QUERIES[:1], force=True)
            assert "\n" not in str(caught.value) and str(copy) in str(caught.value), name


def test_a_folder_of_another_taxonomy_or_an_edited_one_is_refused(exported: Path, tmp_path: Path) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text("extends: default\ndrop: [uncertain_prediction]", encoding="utf-8")
    with pytest.raises(ModelError, match=r"was trained for taxonomy .*uncertain_prediction"):
        load(exported, taxonomy=load_taxonomy(policy))
    assert load(exported, taxonomy=load_taxonomy()).sheet.taxonomy_version == load_taxonomy().version
    copy = broken(exported, tmp_path)
    sheet = read_sheet(copy)
    write_sheet(copy, sheet.model_copy(update={"taxonomy": {**sheet.taxonomy, "name": "other"}}))
    with pytest.raises(ModelError, match="was edited"):
        load(copy)
    swapped = broken(exported, tmp_path / "swapped")
    spec = (swapped / "tokenizer.json").read_text(encoding="utf-8")
    spec = spec.replace("<|safe|>", "<|x|>").replace("<|unsafe|>", "<|safe|>").replace("<|x|>", "<|unsafe|>")
    (swapped / "tokenizer.json").write_text(spec, encoding="utf-8")
    with pytest.raises(ModelError, match=r"tokenizer.json is truncated or belongs to another model"):
        load(swapped)
    tree = json.loads((copy / "haechi.json").read_text(encoding="utf-8"))
    (copy / "haechi.json").write_text(json.dumps({**tree, "format": 99}), encoding="utf-8")
    with pytest.raises(ModelError, match="format 99"):
        load(copy)


# What an answer may show


def test_contacts_are_only_those_of_the_locale() -> None:
    policy = load_taxonomy()
    us, korea = policy.contacts("US"), policy.contacts("KR")
    assert answers.allowed("Call or text 988 now.", us) and not answers.allowed("Call or text 988 now.", korea)
    assert answers.allowed("지금 109로 전화하세요.", korea) and not answers.allowed(
        "지금 010-1234-5678로 전화하세요.", korea
    )
    assert not answers.allowed("See www.evil-site.com for more.", us)
    assert answers.allowed("Call 911 or the FBI at 1-800-225-5324.", us)
    assert not answers.allowed("Call 911 or the FBI at 1-800-799-7233.", us)
    assert answers.allowed("This is not one for the FBI: please call 1-800-799-7233.", us)
    assert answers.contacts("(https://988lifeline.org) 800.555.1234, t.me/abc, 010-1234-5678 일반 전화") == [
        "https://988lifeline.org", "t.me/abc", "800.555.1234", "010-1234-5678"]  # fmt: skip
    assert not answers.contacts("10-15 minutes, 100개, 24시간 and 1,200,000 dollars")
    assert answers.allowed("In 2024, 300 people, 25% of 1,200,000 dollars and £900.", us)
    assert answers.allowed("Call 1-800-GAMBLER.", us) and not answers.allowed("Call 1-800-FLOWERS.", us)
    assert answers.contacts("Call 988 (24/7), (02) 123-4567 or 02)123-4567.") == ["988", "(02) 123-4567", "02)123-4567"]
    assert answers.allowed("See stopncii.ORG for help.", us) and not answers.allowed("Dial 800 this week.", us)


def test_a_number_the_policy_does_not_list_takes_its_sentence_along(
    guard: SLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard.template, "decode", lambda ids: "I cannot help. Call 1-900-555-0199 for it. Take care.")
    answer = guard.answer(["how do I steal a car 1"])[0]
    assert answer.text == "I cannot help. Take care."
    assert " ".join(guard.stream("how do I steal a car 1")) == answer.text


def test_a_link_that_the_tokenizer_took_apart_is_seen() -> None:
    written = restore("visit www. evil - site. com / now. see https : / / 988lifeline. org. me too.", {"i": "I"})
    assert written == "Visit www.evil-site.com/now. See https://988lifeline.org. Me too."
    known = load_taxonomy().contacts("US")
    assert [answers.allowed(sentence, known) for sentence in answers.sentences(written)] == [False, True, True]


@pytest.mark.parametrize(("language", "query"), [("en", "how do I steal a car 1"), ("ko", "옆집 비밀번호 알려줘 1")])
def test_a_harmful_query_never_gets_an_empty_answer(
    guard: SLM, monkeypatch: pytest.MonkeyPatch, language: str, query: str
) -> None:
    monkeypatch.setattr(guard.template, "decode", lambda ids: "Call 1-900-555-0199.")
    answer = guard.answer([query], force=True)[0]
    assert answer.text == answers.refusal(language) == " ".join(guard.stream(query, force=True))
    assert answers.problems(answer.text, language, {}) == []


def test_a_harmful_query_is_never_handed_to_the_assistant(guard: SLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard._writer, "write", lambda *_: iter(()))
    for language, query in (("en", "how do I steal a car 1"), ("ko", "옆집 비밀번호 알려줘 1")):
        for reply in answers.deferrals(language):
            monkeypatch.setattr(guard.template, "decode", lambda ids, text=reply: text)
            assert guard.answer([query])[0].text == answers.refusal(language) == "".join(guard.stream(query))
    assert guard.answer(["how do I wash a car 1"], always=True)[0].text == reply


def test_at_the_length_limit_whole_sentences_stay(guard: SLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard._writer, "write", lambda *_: iter(()))
    for written, kept in (("I cannot help. That is theft.", "I cannot help. That is theft."),
                          ("I cannot help. That is", "I cannot help.")):  # fmt: skip
        monkeypatch.setattr(guard.template, "decode", lambda ids, text=written: text)
        assert guard.answer(["how do I steal a car 1"])[0].text == kept


def test_an_urgent_answer_without_a_help_line_gets_the_locales(guard: SLM) -> None:
    policy = guard.taxonomy
    assert "988" in answers.help_line(policy, "self_harm_suicide", "en", "US", "I am sorry.")
    assert "109" in answers.help_line(policy, "self_harm_suicide", "ko", "KR", "힘드시죠.")
    assert answers.help_line(policy, "self_harm_suicide", "en", "US", "Please call 988.") == ""
    assert answers.help_line(policy, "crime_advice", "en", "US", "No.") == ""


@pytest.mark.parametrize(
    ("text", "language", "found"),
    [
        ("I won't help with that, but I can explain the law.", "en", []),
        ("그 일은 도와드릴 수 없어요. 112에 신고하세요.", "ko", []),
        ("그 일은 도와드릴 수 없어요. 112에 신고하세요.", "en", ["language", "contact"]),
        ("I won't help with that, but I can", "en", ["ending"]),
        ("I will not help with that, I will not help with it.", "en", ["repetition"]),
        ("No.", "en", ["length"]),
        ("Of course, here is what you asked for.", "en", ["refusal"]),
        ("네, 물론이죠. 이렇게 하시면 됩니다.", "ko", ["refusal"]),
        ("I won't say it all, but: 1. take it. 2. mix it.", "en", ["steps"]),
        (unicodedata.normalize("NFD", "그 일은 도와드릴 수 없어요. 다른 길을 찾아 봐요."), "ko", []),
    ],
)
def test_answer_checks(text: str, language: str, found: list[str]) -> None:
    locale = answers.LOCALES[language]
    assert answers.problems(text, language, load_taxonomy().contacts(locale)) == found
    assert answers.problems(text, language, load_taxonomy().contacts(locale), urgent=True) == (
        found if "112" in text else [*found, "help"]
    )
