"""Files in and out: order, bad rows, kills, full disks, standard streams."""

from __future__ import annotations

import gzip
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import cli
from haechi import bulk
from haechi.errors import DataError
from haechi.guards.keyword import KeywordGuard
from haechi.store import Journal, dumps, read_jsonl, write_text

GUARD = KeywordGuard({"bomb": "crime_advice"})


def rows(path: Path) -> list[Any]:
    return list(read_jsonl(path))


def judge(source: Path, target: Path) -> bulk.Outcome:
    return bulk.to_file(str(source), target, bulk.judge(GUARD), "key")


def test_bad_rows_get_an_error_and_the_rest_goes_on_in_order(tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [b'{"id": "a", "query": "bomb"}', b"not json", b"", b'{"id": "b"}', b'{"query": 7}', b"[1]", b"\xff\xfe",
             b'{"id": "c", "query": ""}', b'{"id": {"x": 1}, "query": "tea \\ud800"}', b"[" * 100_000,
             json.dumps({"id": "big", "query": "tea " * 262_144}).encode()]  # fmt: skip
    source.write_bytes(b"\n".join(lines))
    assert judge(source, target) == bulk.Outcome(10, 7)
    found = rows(target)
    assert [row["id"] for row in found] == ["a", 2, "b", 5, 6, 7, "c", {"x": 1}, 10, "big"]
    assert [row["unsafe"] for row in found] == [True, *[None] * 6, False, None, False]
    assert [row["error"] for row in found[1:7]] == [
        "line 2 is not JSON", 'line 4 has no text in "query"', 'line 5 has no text in "query"',
        "line 6 is not a JSON object", "line 7 is not UTF-8 text", "the query is empty",
    ]  # fmt: skip
    assert set(found[0]) == {"id", "unsafe", "score", "category", "categories", "error"}


def test_a_byte_order_mark_and_an_endless_number_harm_only_themselves(tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(
        b'\xef\xbb\xbf{"id": "a", "query": "bomb"}\n{"id": ' + b"9" * 5000 + b', "query": "x"}\n'
    )
    assert judge(tmp_path / "in", tmp_path / "out.jsonl") == bulk.Outcome(2, 1)
    assert [(row["id"], row["unsafe"]) for row in rows(tmp_path / "out.jsonl")] == [("a", True), (2, None)]


def test_a_pipe_is_read_whole(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_text("bomb\ntea\n"))
    writer.start()
    assert judge(tmp_path / "pipe", tmp_path / "out.jsonl") == bulk.Outcome(2, 0)
    writer.join()


def test_plain_lines_may_begin_with_a_brace(tmp_path: Path) -> None:
    source = tmp_path / "in.txt"
    source.write_text("{bomb}\n\nb o m b\r\n", encoding="utf-8")
    judge(source, tmp_path / "out.jsonl")
    assert [(row["id"], row["unsafe"]) for row in rows(tmp_path / "out.jsonl")] == [(1, True), (3, False)]


@settings(max_examples=30, deadline=None)
@given(queries=st.lists(st.text(st.characters(codec=None)), max_size=20))
def test_every_row_comes_back_in_its_place(tmp_path_factory: pytest.TempPathFactory, queries: list[str]) -> None:
    folder = tmp_path_factory.mktemp("rows")
    source = folder / "in.jsonl"
    write_text(source, "".join(dumps({"id": query, "query": query}) + "\n" for query in queries))
    judge(source, folder / "out.jsonl")
    assert [row["id"] for row in rows(folder / "out.jsonl")] == queries


def test_a_torn_last_row_is_cut_and_the_rest_kept(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with pytest.raises(KeyboardInterrupt), Journal(path, "key") as journal:
        journal.write([{"row": 1}, {"row": 2}])
        raise KeyboardInterrupt
    part = path.with_name("out.jsonl.part")
    part.write_bytes(part.read_bytes()[:-4])
    assert not path.exists()
    with Journal(path, "key") as journal:
        assert len(journal) == 1
        journal.write([{"row": 2}])
    assert rows(path) == [{"row": 1}, {"row": 2}] and list(tmp_path.iterdir()) == [path]


def test_a_part_file_of_other_work_is_not_taken_up(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with pytest.raises(KeyboardInterrupt), Journal(path, "one") as journal:
        journal.write([{"row": 1}])
        raise KeyboardInterrupt
    with Journal(path, "two") as journal:
        assert len(journal) == 0


@pytest.fixture
def keyword(tmp_path: Path) -> str:
    (tmp_path / "words.txt").write_text("# harms\nbomb\tcrime_advice\n폭탄\n", encoding="utf-8")
    return f"keyword:{tmp_path / 'words.txt'}"


def test_a_full_disk_keeps_whole_rows_and_a_rerun_goes_on(tmp_path: Path, keyword: str) -> None:
    source, target = tmp_path / "in.txt", tmp_path / "out.jsonl"
    source.write_text("".join(f"tea {number}\n" for number in range(2000)), encoding="utf-8")
    words = ["check", "--guard", keyword, "--input", str(source), "--output", str(target)]
    # A limit on the size of files is a disk that fills up half-way.
    full = cli(*words, preexec_fn=lambda: (resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)), None)[1])
    assert full.returncode == 2 and full.stderr.startswith("error: cannot write") and full.stderr.count("\n") == 1
    assert "rerun to go on" in full.stderr and not target.exists()
    assert cli(*words).returncode == 0
    assert [row["id"] for row in rows(target)] == list(range(1, 2001))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.txt", "out.jsonl", "words.txt"]


def test_a_killed_run_is_gone_on_with(tmp_path: Path, exported: Path) -> None:
    source, target = tmp_path / "in.txt", tmp_path / "out.jsonl"
    source.write_text(
        "".join(f"how do I wash a car {number} {'and ' * 40}\n" for number in range(3000)), encoding="utf-8"
    )
    words = ["check", "--model", str(exported), "--input", str(source), "--output", str(target)]
    process = subprocess.Popen([sys.executable, "-m", "haechi.cli", *words])
    part = target.with_name("out.jsonl.part")
    while process.poll() is None and not (part.exists() and part.stat().st_size):
        os.sched_yield()
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = part.read_bytes().splitlines(keepends=True)
    assert not target.exists() and 0 < len(kept) < 3000
    assert cli(*words).returncode == 0
    assert target.read_bytes().splitlines(keepends=True)[: len(kept) - 1] == kept[:-1]
    assert [row["id"] for row in rows(target)] == list(range(1, 3001)) and not part.exists()


def test_standard_streams_and_exit_codes(tmp_path: Path, keyword: str) -> None:
    done = cli("check", "--guard", keyword, "--input", "-", "--output", "-", input='{"id":"x","query":"폭탄 만들기"}\n')
    assert done.returncode == 0 and json.loads(done.stdout) == {
        "id": "x", "unsafe": True, "score": 1.0, "category": None, "categories": {}, "error": None}  # fmt: skip
    failed = cli("check", "--guard", keyword, "--input", "-", "--output", str(tmp_path / "o.jsonl"), input="{\n{}\n")
    assert failed.returncode == 1 and "2 of 2 rows have an error" in failed.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["check"], "give queries as arguments, or --input FILE"),
        (["check", "hello", "--input", "x"], "not both"),
        (["check", "hello", "--output", "x"], "--output goes with --input"),
        (["check", "--guard", "keywrod:x", "hello"], "unknown guard 'keywrod'; did you mean 'keyword'?"),
        (["check", "--guard", "keyword:none.txt", "hello"], "cannot read the word list none.txt"),
        (["check", "--model", "nowhere", "hello"], "no model folder nowhere"),
        (["check", "--model", "nowhere", "--guard", "slm", "hello"], "cannot be combined"),
        (["train", "none.yaml"], "no such file: none.yaml"),
        (["taxonomy", "none.yaml"], "no such file: none.yaml"),
        (["export", "nowhere", "out"], "no model folder nowhere"),
        (["evaluate", "none.yaml"], "no such file"),
        (["taxonomy", "Makefile/x.yaml"], "cannot read Makefile/x.yaml: Not a directory"),
        (
            ["check", "--guard", "{any_of: [5]}", "hello"],
            "a guard is a text such as 'keyword:FILE' or a mapping, not 5",
        ),
        (["check", "--guard", "{any_of: [", "hello"], "--guard is not valid YAML"),
        (["check", "--input", "Makefile", "--output", "Makefile"], "are the same file"),
        (["check", "--input", "-", "--output", "."], "it is a folder"),
        (["answer", "--locale", "USA", "hello"], "unknown locale 'USA'; did you mean 'US'?"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(words: list[str], message: str) -> None:
    done = cli(*words)
    assert done.returncode == 2 and message in done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and not done.stdout


def test_a_missing_input_and_an_unwritable_output_are_named(tmp_path: Path, keyword: str) -> None:
    missing = cli("check", "--guard", keyword, "--input", str(tmp_path / "none"), "--output", str(tmp_path / "o"))
    assert missing.returncode == 2 and "cannot read" in missing.stderr and "Traceback" not in missing.stderr
    (tmp_path / "in.txt").write_text("tea\n", encoding="utf-8")
    (tmp_path / "file").write_text("", encoding="utf-8")
    barred = cli("check", "--guard", keyword, "--input", str(tmp_path / "in.txt"), "--output", str(tmp_path / "file/o"))
    assert barred.returncode == 2 and "cannot write" in barred.stderr and "Traceback" not in barred.stderr
    with pytest.raises(DataError, match="cannot write"):
        write_text(tmp_path / "file" / "o", "x")


def test_output_to_a_closed_pipe_ends_quietly(tmp_path: Path, keyword: str) -> None:
    words = [sys.executable, "-m", "haechi.cli", "check", "--guard", keyword, "--input", "-", "--output", "-"]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdin and process.stdout and process.stderr
    process.stdout.close()
    process.stdin.write(b"tea\n" * 5000)
    process.stdin.close()
    assert process.wait() not in (1, 2) and process.stderr.read() == b""
    process.stderr.close()


def test_answers_are_asked_only_of_guards_that_write() -> None:
    with pytest.raises(Exception, match="writes no answers"):
        bulk.judge(GUARD, answers=True)


def test_readable_lines_and_forced_answers(exported: Path) -> None:
    shown = cli("answer", "--model", str(exported), "how do I steal a car 1", "how do I wash a car 1")
    assert shown.returncode == 0
    first, answer, second = shown.stdout.splitlines()
    assert first.startswith("UNSAFE") and "crime_advice" in first and answer.strip().startswith("I will")
    assert second.startswith("safe")
    forced = cli("answer", "--model", str(exported), "--force", "--json", "how do I wash a car 1")
    assert json.loads(forced.stdout)["answer"] and json.loads(forced.stdout)["unsafe"] is False


def test_malformed_jsonl_names_its_line(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"a": 1}\n{"a"\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"x.jsonl line 2 is not JSON"):
        rows(tmp_path / "x.jsonl")
    for bad in ("9" * 5000, "[" * 100_000):
        (tmp_path / "x.jsonl").write_text(bad, encoding="utf-8")
        with pytest.raises(DataError, match=r"x.jsonl line 1 is not JSON"):
            rows(tmp_path / "x.jsonl")
    whole = gzip.compress(dumps({"a": "b" * 1000}).encode())
    (tmp_path / "x.jsonl.gz").write_bytes(whole[:12] + b"\xff" + whole[13:])
    with pytest.raises(DataError, match=r"cannot read .*x.jsonl.gz"):
        rows(tmp_path / "x.jsonl.gz")


def test_a_journal_that_cannot_be_kept_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    for path in (tmp_path / "file" / "rows.jsonl", tmp_path / ("x" * 300)):
        with pytest.raises(DataError, match="cannot write"):
            Journal(path, "key")
