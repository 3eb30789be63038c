"""Whether `haechi evaluate` is ever the bottleneck: `python benchmarks/harness.py [ROWS ...]`; the last line is JSON.

Sets of so many rows (default 100,000 and 1,000,000), made of the corpus's queries over and over, are measured with
the keyword guard, each in a process of its own: rows per second of the whole evaluation, intervals and tables included
but not the start (importing scikit-learn and scipy, done by a first evaluation of a thousand rows), and the process's
peak of resident memory.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from itertools import cycle, islice
from pathlib import Path

from haechi import evaluate
from haechi.costs import peak_memory
from haechi.evaluate import EvaluateConfig
from haechi.sets import read_set
from haechi.store import dumps

ROOT = Path(__file__).parents[1]
_WARM_UP = 1000


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", type=int, nargs="*", default=[100_000, 1_000_000])
    parser.add_argument("--set", type=Path, help="measure this file, in this process")
    arguments = parser.parse_args()
    if arguments.set:
        print(json.dumps(_measure(arguments.set)))
        return
    runs = []
    for count in arguments.rows:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "rows.jsonl"
            _write(file, count)
            _write(file.with_name("few.jsonl"), _WARM_UP)
            command = [sys.executable, __file__, "--set", str(file)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        measured = {"rows": count, **json.loads(done.stdout.splitlines()[-1])}
        print(f"{count:>9,} rows  {measured['rows_per_s']:>8,.0f} rows/s  {measured['memory_mb']:.0f} MB")
        runs.append(measured)
    print(json.dumps({"benchmark": "harness", "guard": "keyword", "runs": runs}))


def _write(file: Path, count: int) -> None:
    """A set of `count` rows with ids of their own."""
    known = [row for name in ("train.en", "train.ko") for row in read_set(name) if row.label]
    with file.open("w", encoding="utf-8") as out:
        for number, row in enumerate(islice(cycle(known), count)):
            kept = {"id": str(number), "lang": row.lang, "query": row.query, "label": row.label}
            out.write(dumps({**kept, "category": row.category, "kind": row.kind}) + "\n")


def _measure(file: Path) -> dict[str, float]:
    with file.open("rb") as lines:
        rows = sum(1 for _ in lines)
    for each in (file.with_name("few.jsonl"), file):
        config = EvaluateConfig(
            output=each.with_suffix(""), guards=(f"keyword:{ROOT / 'examples' / 'keywords.txt'}",), sets=(str(each),)
        )
        started = time.perf_counter()
        evaluate.run(config, lambda line: None)
        seconds = time.perf_counter() - started
    return {"rows_per_s": rows / seconds, "memory_mb": peak_memory()}


if __name__ == "__main__":
    main()
