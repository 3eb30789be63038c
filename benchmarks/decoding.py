"""How answers should be decoded: `python benchmarks/decoding.py ROWS`; the last line is JSON.

ROWS is a folder made by `haechi curate`; the harmful rows of its validation part that have a reference answer are
answered (forced) at several repetition penalties. Per language: the share that passes every check of
`haechi.answers.problems`, and how near the answers come to the references (F1 of character 3-grams).
"""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter
from pathlib import Path

from haechi import answers
from haechi.guards import slm, writer
from haechi.schema import Example
from haechi.store import read_jsonl

PENALTIES = (1.0, 1.05, 1.1, 1.2, 1.3)


def nearness(text: str, reference: str) -> float:
    """F1 of character 3-grams."""
    ours, theirs = (
        Counter(one[at : at + 3] for at in range(len(one) - 2)) for one in (text.lower(), reference.lower())
    )
    shared = sum((ours & theirs).values())
    return 2 * shared / max(1, ours.total() + theirs.total())


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--model", type=Path, default=None)
    parser.add_argument("--count", type=int, default=120, help="rows of each language")
    arguments = parser.parse_args()
    every = [Example(**row["example"]) for row in read_jsonl(arguments.rows / "valid.jsonl")]
    guard = slm.load(arguments.model, answers=slm.WRITTEN)
    result: dict[str, dict[str, dict[str, float]]] = {}
    for language in ("en", "ko"):
        rows = [row for row in every if row.label == "unsafe" and row.response and row.lang == language]
        rows = random.Random(0).sample(rows, min(arguments.count, len(rows)))
        known = guard.taxonomy.contacts(answers.LOCALES[language])
        for penalty in PENALTIES:
            writer.REPETITION_PENALTY = penalty
            written = [answer.text or "" for answer in guard.answer([row.query for row in rows], force=True)]
            passed = sum(not answers.problems(text, language, known) for text in written) / len(rows)
            near = sum(nearness(text, row.response or "") for text, row in zip(written, rows, strict=True)) / len(rows)
            length = sum(map(len, written)) / len(rows)
            result.setdefault(language, {})[str(penalty)] = {"passed": passed, "nearness": near, "characters": length}
            print(f"{language} penalty {penalty}: {passed:.3f} pass, nearness {near:.3f}, {length:.0f} characters")
    print(json.dumps({"benchmark": "decoding", "model": guard.name, "rows": arguments.count, "penalties": result}))


if __name__ == "__main__":
    main()
