"""What int8 costs: `python benchmarks/precision.py MODEL_FP32 [MODEL_INT8]`; the last line is JSON.

Both are folders made by `haechi export` from the same trained model (default int8: the embedded one). Weighted F1 at
the default point on each set, and how many verdicts differ.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from haechi import metrics
from haechi.guards.slm import load
from haechi.modelfolder import default_model
from haechi.sets import load_set

SETS = ("xstest", "xstest.ko", "policy_test.en", "policy_test.ko", "jailbreakbench")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("fp32", type=Path)
    parser.add_argument("int8", type=Path, nargs="?", default=default_model())
    arguments = parser.parse_args()
    guards = {"fp32": load(arguments.fp32), "int8": load(arguments.int8)}
    for name, guard in guards.items():
        if guard.sheet.precision != name:
            parser.error(f"{getattr(arguments, name)} is an export in {guard.sheet.precision}, not {name}")
    result: dict[str, object] = {"benchmark": "precision", "model": guards["int8"].name, "sets": {}}
    sets: dict[str, dict[str, float]] = {}
    for name in SETS:
        rows = [row for row in load_set(name) if row.label]
        truth = np.array([row.label == "unsafe" for row in rows])
        verdicts = {each: guard.check([row.query for row in rows]) for each, guard in guards.items()}
        f1 = {
            each: float(metrics.scores(metrics.cells(truth, metrics.Said.from_verdicts(said)))["weighted_f1"])
            for each, said in verdicts.items()
        }
        differ = sum(one.unsafe != other.unsafe for one, other in zip(*verdicts.values(), strict=True))
        sets[name] = {**f1, "lost": f1["fp32"] - f1["int8"], "rows": len(rows), "verdicts_that_differ": differ}
        print(f"{name:16} fp32 {f1['fp32']:.4f}  int8 {f1['int8']:.4f}  {differ} of {len(rows)} verdicts differ")
    lost = sum(one["lost"] for one in sets.values()) / len(sets)
    print(json.dumps({**result, "sets": sets, "mean_lost": lost}))


if __name__ == "__main__":
    main()
