"""Guards behind HTTP, over their real protocols on loopback, faults included."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from conftest import Loopback, Said, examples
from haechi.errors import ConfigError, DataError, MissingExtra
from haechi.evaluate import EvaluateConfig
from haechi.evaluate import run as evaluate
from haechi.guards import judged, load_guard
from haechi.llm import ChatModel
from haechi.schema import Conversation, Verdict


def said(text: str | None, logprobs: dict[str, float] | None = None, finish: str = "stop", **message: Any) -> Said:
    """A chat completion as the documentation shows it."""
    first = [{"token": token, "logprob": value} for token, value in (logprobs or {}).items()]
    content = [{"token": "x", "logprob": 0.0, "top_logprobs": first}] if first else None
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": text, **message},
        "finish_reason": finish,
        "logprobs": {"content": content},
    }
    return 200, {
        "object": "chat.completion",
        "choices": [choice],
        "usage": {"prompt_tokens": 40, "completion_tokens": 2},
    }


def refused(status: int, message: str) -> Said:
    """An error as OpenAI-compatible endpoints give it."""
    return status, {"error": {"message": message, "type": "invalid_request_error", "code": None}}


def settings(server: Loopback, **more: Any) -> dict[str, Any]:
    return {"model": "m", "url": server.url, "backoff": 0.0, **more}


def last(body: Any) -> str:
    """The query inside a judge's last message."""
    return str(body["messages"][-1]["content"]).removeprefix("<query>\n").removesuffix("\n</query>")


def test_a_judge_reads_label_category_and_probability(server: Loopback) -> None:
    server.reply = lambda path, body, number: (
        said("Unsafe crime_advice.", {"un": -0.2, " safe": -2.0, "the": -3.0})
        if "car" in last(body)
        else said("safe", {"safe": -0.1})
    )
    guard = load_guard({"judge": settings(server)})
    bad, good, empty = guard.check(["steal a car", "thank you", " "])
    assert bad.unsafe and bad.category == "crime_advice" and bad.score == pytest.approx(0.8581, abs=1e-4)
    assert good.unsafe is False and good.score == 0.0 and good.category is None
    assert empty.unsafe is None and empty.error == "the query is empty"
    path, headers, body = server.asked[0]
    assert path == "/chat/completions" and "Authorization" not in headers and body["temperature"] == 0
    assert "crime_advice" in body["messages"][0]["content"] and len(body["messages"]) == 2
    assert guard.endpoint.usage.summary("", guard.endpoint.access)["input_tokens"] == 80  # type: ignore[attr-defined]


def test_examples_are_drawn_from_the_corpus_and_never_from_a_test_set(server: Loopback, tmp_path: Path) -> None:
    server.reply = lambda path, body, number: said("safe")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(row.model_dump_json() + "\n" for row in examples(3)), encoding="utf-8")
    guard = load_guard({"judge-ic": settings(server, examples=2, examples_from=[str(rows)])})
    assert guard.name == "judge-ic:m" and guard.check(["hello"])[0].unsafe is False
    turns = server.asked[0][2]["messages"]
    assert [turn["content"] for turn in turns if turn["role"] == "assistant"] == ["unsafe crime_advice", "safe"] * 2
    again = load_guard({"judge-ic": settings(server, examples=2, examples_from=[str(rows)])})
    other = load_guard({"judge-ic": settings(server, examples=2, examples_from=[str(rows)], examples_seed=1)})
    assert again.identity == guard.identity != other.identity
    for changes, told in (
        ({"examples_from": ["policy_test.en"]}, "for measuring only"),
        ({"examples": 99, "examples_from": [str(rows)]}, "hold 12 unsafe rows, not 99"),
        ({"exampels": 1}, "did you mean 'examples'"),
    ):
        with pytest.raises(ConfigError, match=told):
            load_guard({"judge-ic": settings(server, **changes)})


@pytest.mark.parametrize(
    ("reply", "told"),
    [
        (said("I cannot say."), "said neither safe nor unsafe: 'I cannot say.'"),
        (said(None), "gave no text (empty)"),
        (said("", finish="length"), "all tokens went into thought"),
        (said("safe", finish="content_filter"), "content filter withheld"),
        (refused(400, "The response was filtered: content_filter"), "said 400"),
        ((200, {"choices": []}), "not a completion"),
        (
            (200, {"choices": [{"message": {"content": "safe"}, "logprobs": {"content": [{}]}}]}),
            "not a completion",
        ),
    ],
)
def test_what_is_no_verdict_is_an_error(server: Loopback, reply: Said, told: str) -> None:
    server.reply = lambda path, body, number: reply if last(body) == "odd" else said("safe")
    good, odd = load_guard({"judge": settings(server)}).check(["good", "odd"])
    assert good.unsafe is False and odd.unsafe is None and told in (odd.error or ""), odd


@pytest.mark.parametrize(
    "fault", [(429, {}), (503, b"busy"), (200, b'{"choices": [{"mess'), (200, b"[]"), (408, {})], ids=str
)
def test_passing_faults_are_tried_again(server: Loopback, fault: Said) -> None:
    server.headers = {"retry-after": "0"}
    server.reply = lambda path, body, number: fault if number < 3 else said("unsafe")
    guard = load_guard({"judge": settings(server)})
    assert guard.check(["q"])[0].unsafe and len(server.asked) == 3
    assert guard.endpoint.usage.retries == 2  # type: ignore[attr-defined]
    server.asked.clear()
    server.reply = lambda path, body, number: fault
    (verdict,) = load_guard({"judge": settings(server, retries=1)}).check(["q"])
    assert verdict.unsafe is None and verdict.error and len(server.asked) == 2


def test_a_slow_reply_is_tried_again(server: Loopback) -> None:
    held = threading.Event()

    def reply(path: str, body: Any, number: int) -> Said:
        if number == 1:
            held.wait(10)
        return said("safe")

    server.reply = reply
    patient, hasty = (load_guard({"judge": settings(server, timeout=1.0, retries=tries)}) for tries in (1, 0))
    assert patient.check(["q"])[0].unsafe is False and len(server.asked) == 2
    server.asked.clear()
    assert hasty.check(["q"])[0].error == f"{server.url} gave no reply within 1 s"
    held.set()


def test_parameters_a_model_refuses_are_left_out_for_good(server: Loopback) -> None:
    def reply(path: str, body: Any, number: int) -> Said:
        if "max_tokens" in body:
            return refused(400, "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.")
        if "logprobs" in body:
            return refused(400, "This model does not support logprobs")
        return said("unsafe")

    server.reply = reply
    guard = load_guard({"judge": settings(server, max_tokens=500, concurrency=1)})
    assert guard.check(["a", "b"]) == [Verdict(unsafe=True)] * 2
    server.asked.clear()
    assert guard.check(["c"]) == [Verdict(unsafe=True)] and len(server.asked) == 1
    assert server.asked[0][2]["max_completion_tokens"] == 500


def test_what_will_not_get_better_is_asked_once_and_stops_an_evaluation(server: Loopback, tmp_path: Path) -> None:
    server.reply = lambda path, body, number: refused(401, "Incorrect API key provided")
    guard = load_guard({"judge": settings(server, concurrency=1)})
    with pytest.raises(ConfigError, match=r"answered none of 3 rows: .* said 401: Incorrect API key provided"):
        judged(guard, ["a", "b", "c"])
    assert len(server.asked) == 1
    nowhere = load_guard({"judge": {"model": "m", "url": "http://127.0.0.1:9", "concurrency": 1}})
    with pytest.raises(ConfigError, match=r"answered none of 2 rows: cannot reach http://127.0.0.1:9"):
        judged(nowhere, ["a", "b"])
    assert judged(nowhere, [" "])[0].error == "the query is empty"
    with pytest.raises(ConfigError, match=r"gpt-4 at https://api.openai.com/v1 needs a key: export OPENAI_API_KEY"):
        load_guard("judge:gpt-4")


def test_replies_are_kept_and_a_stopped_evaluation_asks_only_for_the_rest(server: Loopback, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(row.model_dump_json() + "\n" for row in examples(2)), encoding="utf-8")
    spec = {"judge": settings(server, cache=str(tmp_path / "kept" / "replies.sqlite"), concurrency=4)}
    server.together = threading.Barrier(2)
    server.reply = lambda path, body, number: said("safe") if number <= 10 else refused(403, "out of credit")
    first = load_guard(spec).check([row.query for row in examples(2)])
    assert sum(verdict.error is None for verdict in first) >= 10 and 1 < server.most <= 4
    server.asked.clear()
    server.together = None
    server.reply = lambda path, body, number: said("unsafe")
    config = EvaluateConfig(output=tmp_path / "out", guards=(spec,), sets=(str(rows),), draws=100)
    result = evaluate(config, lambda line: None)["guards"]["judge:m"]
    (usage,) = result["usage"]
    assert usage["cached"] == 10 and len(server.asked) == usage["requests"] == 6
    figures = result["sets"][str(rows)]
    assert figures["errors"] == 0 and figures["cells"]


def test_rows_without_an_answer_are_asked_again_and_costs_add_up(server: Loopback, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(row.model_dump_json() + "\n" for row in examples(2)), encoding="utf-8")
    spec = {"judge": settings(server, concurrency=1, retries=0, dollars_in=10.0)}
    config = EvaluateConfig(output=tmp_path / "out", guards=(spec,), sets=(str(rows),), draws=100)

    def run() -> tuple[int, dict[str, Any]]:
        server.asked.clear()
        (guard,) = evaluate(config, lambda line: None)["guards"].values()
        (usage,) = guard["usage"]
        return guard["sets"][str(rows)]["errors"], usage

    # The key is refused after six rows, four of them written down: nothing is called an answer that is none.
    server.reply = lambda path, body, number: said("safe") if number <= 6 else refused(403, "out of credit")
    with pytest.raises(ConfigError, match=r"judge:m stopped answering after 2 rows: .* said 403: out of credit"):
        run()
    assert not (tmp_path / "out" / "metrics.json").exists()
    server.reply = lambda path, body, number: (503, b"busy") if number % 6 == 0 else said("safe")
    errors, usage = run()
    assert errors == 2 and len(server.asked) == 12 and usage["requests"] == 6 + 10 and usage["failures"] == 1 + 2
    server.reply = lambda path, body, number: said("safe") if number == 1 else refused(400, "content_filter")
    errors, usage = run()
    assert errors == 1 and len(server.asked) == 2, "only what had failed is asked again"
    assert usage["requests"] == 17 and usage["dollars"] == pytest.approx(17 * 40 * 10 / 1e6) and usage["p50_ms"] > 0


def test_queries_are_paraphrased_once_and_what_is_declined_stays(server: Loopback, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(row.model_dump_json() + "\n" for row in examples(1)), encoding="utf-8")
    (tmp_path / "words.txt").write_text("steal\nworthless\n", encoding="utf-8")

    def reply(path: str, body: Any, number: int) -> Said:
        query = last(body).removeprefix("<query>").removesuffix("</query>")
        assert "change a few words" in body["messages"][0]["content"]
        text = "I can't reword that." if "worthless" in query else query.replace("steal", "quietly obtain")
        return 200, {"choices": [{"message": {"content": text}, "finish_reason": "stop"}]}

    server.reply = reply
    config = EvaluateConfig(
        output=tmp_path / "out",
        guards=(f"keyword:{tmp_path / 'words.txt'}",),
        sets=(str(rows),),
        perturbations={"paraphrase": ("low",)},
        paraphraser=ChatModel(**settings(server)),
        draws=100,
    )
    for _ in range(2):
        measured = evaluate(config, lambda line: None)["guards"]["keyword"]["robustness"][str(rows)]
        assert measured["paraphrase"]["low"]["changed"] == 1 / 8 and len(server.asked) == 8
    assert measured["paraphrase"]["low"]["unsafe_recall"] == 0.25, "'worthless' is still there, 'steal' is not"
    with pytest.raises(ValueError, match="go together"):
        EvaluateConfig(**{**config.model_dump(), "paraphraser": None})
    server.reply = lambda path, body, number: refused(403, "no")
    with pytest.raises(ConfigError, match=r"not one of 8 queries of .* could be paraphrased: .* said 403"):
        evaluate(config.model_copy(update={"output": tmp_path / "again"}), lambda line: None)
    server.reply = reply
    mended = evaluate(config.model_copy(update={"output": tmp_path / "again"}), lambda line: None)
    assert mended["guards"]["keyword"]["robustness"][str(rows)]["paraphrase"]["low"]["changed"] == 1 / 8


def test_a_refusal_is_the_verdict_of_an_aligned_model(server: Loopback) -> None:
    texts = {"a": "I'm sorry, but I can't help with that.", "b": "Wash it with soap.", "c": "그건 도와드릴 수 없어요."}

    def reply(path: str, body: Any, number: int) -> Said:
        query = last(body)
        if query in texts:
            return said(texts[query])
        return said(None, refusal="I can't assist with that.") if query == "d" else said(None, finish="content_filter")

    server.reply = reply
    verdicts = load_guard({"refusal": settings(server)}).check(["a", "b", "c", "d", "e"])
    assert [verdict.unsafe for verdict in verdicts] == [True, False, True, True, True]
    assert server.asked[0][2]["messages"] == [{"role": "user", "content": server.asked[0][2]["messages"][0]["content"]}]


def test_moderation_services_speak_their_own_protocols(server: Loopback, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("OPENAI_API_KEY", "PERSPECTIVE_API_KEY", "AZURE_CONTENT_SAFETY_KEY"):
        with pytest.raises(ConfigError, match=f"needs a key: export {variable}"):
            load_guard(
                {
                    "OPENAI_API_KEY": "openai-moderation",
                    "PERSPECTIVE_API_KEY": "perspective",
                    "AZURE_CONTENT_SAFETY_KEY": f"azure-content-safety:{server.url}",
                }[variable]
            )
        monkeypatch.setenv(variable, "secret")
    replies: dict[str, Said] = {
        "/moderations": (
            200,
            {"results": [{"flagged": True, "categories": {}, "category_scores": {"violence": 0.9, "hate": 0.1}}]},
        ),
        "/comments:analyze?key=secret": (200, {"attributeScores": {"TOXICITY": {"summaryScore": {"value": 0.4}}}}),
        "/contentsafety/text:analyze?api-version=2024-09-01": (
            200,
            {
                "blocklistsMatch": [],
                "categoriesAnalysis": [{"category": "Hate", "severity": 0}, {"category": "Violence", "severity": 4}],
            },
        ),
    }
    server.reply = lambda path, body, number: replies[path]
    openai = load_guard({"openai-moderation": {"url": server.url}})
    perspective = load_guard({"perspective": {"url": server.url}})
    azure = load_guard(f"azure-content-safety:{server.url}")
    (verdict,) = openai.check(["q"])
    assert verdict.unsafe and verdict.score == 0.9 and verdict.category == "violence"
    assert perspective.check(["q"]) == [Verdict(unsafe=False, score=0.4)]
    (verdict,) = azure.check(["q"])
    assert verdict.unsafe and verdict.score == pytest.approx(4 / 7) and verdict.category == "Violence"
    assert server.asked[0][1]["Authorization"] == "Bearer secret"
    assert server.asked[2][1]["Ocp-Apim-Subscription-Key"] == "secret"
    for guard in (openai, perspective, azure):
        server.asked.clear()
        server.headers = {"retry-after": "0"}
        server.reply = lambda path, body, number: replies[path] if number == 3 else ((429, {}), (200, b"{"))[number - 1]
        assert guard.check(["q"])[0].error is None and len(server.asked) == 3
    server.reply = lambda path, body, number: (200, {"results": [], "attributeScores": {}, "categoriesAnalysis": []})
    for guard in (openai, perspective, azure):
        assert "lacks what the documentation promises" in (guard.check(["q"])[0].error or "")
        assert guard.check([""])[0].error == "the query is empty"


def test_frozen_verdicts_are_replayed_by_id(tmp_path: Path) -> None:
    file = tmp_path / "frozen.jsonl"
    stored = Verdict(unsafe=True, score=0.7, category="x")
    file.write_text(json.dumps({"id": "a", **stored.model_dump()}) + "\n", encoding="utf-8")
    guard = load_guard(f"frozen:{file}")
    found, lost, nameless = guard.check([Conversation.from_query("q", "a"), Conversation.from_query("q", "b"), "q"])
    assert found == stored and "no verdict is stored for 'b'" in (lost.error or "") and nameless.unsafe is None
    other = tmp_path / "other.jsonl"
    other.write_text('{"id": "b", "unsafe": false}\n', encoding="utf-8")
    both = load_guard({"frozen": {"files": [str(file), str(other)], "name": "Perspective API"}})
    assert both.name == "Perspective API"
    assert [one.unsafe for one in both.check([Conversation.from_query("q", id) for id in "ab"])] == [True, False]
    file.write_text('{"id": "a", "unsafe": true}\n' * 2, encoding="utf-8")
    with pytest.raises(DataError, match="line 2: the id 'a' is there twice"):
        load_guard(f"frozen:{file}")
    file.write_text('{"unsafe": true}\n', encoding="utf-8")
    with pytest.raises(DataError, match="line 1: a verdict needs the id"):
        load_guard(f"frozen:{file}")


def test_a_missing_extra_is_one_line_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, extra, spec in (("httpx2", "remote", "judge:m"), ("haechi.guards.local", "train", "qwen3guard:m")):
        monkeypatch.setenv("OPENAI_API_KEY", "secret")
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(MissingExtra, match=rf"pip install.*\[{extra}\]"):
            load_guard(spec)


def test_a_guard_that_breaks_its_word_is_told() -> None:
    class Short:
        name = identity = "short"

        def check(self, conversations: Any) -> list[Verdict]:
            return [Verdict(unsafe=False)]

    with pytest.raises(ConfigError, match="short gave 1 verdicts for 2 rows"):
        judged(Short(), ["a", "b"])
    with pytest.raises(ConfigError, match="settings of a judge guard are a mapping"):
        load_guard({"judge": "gpt-4"})
