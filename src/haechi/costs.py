"""What a guard costs on this machine: start, memory, latency of single queries, throughput of many.

Measured in a process of its own, so that one guard's memory and warm caches are not another's.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from haechi.errors import HaechiError

_WARM_UP = 3


def costs(spec: str | Mapping[str, Any], queries: Sequence[str]) -> dict[str, float]:
    """Seconds until a fresh process has its first verdict (`start_s`), milliseconds of single queries (`p50_ms`,
    `p99_ms`), rows per second of all together (`rows_per_s`), and the peak of resident memory (`memory_mb`).

    Raises HaechiError with the last line the process said when it fails.
    """
    asked = json.dumps({"spec": spec, "queries": list(queries)})
    command = [sys.executable, "-m", "haechi.costs"]
    done = subprocess.run(command, input=asked, capture_output=True, text=True, encoding="utf-8")
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"code {done.returncode}"]
        raise HaechiError(f"timing {spec} failed: {said[-1][:200]}")
    measured: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return measured


def peak_memory() -> float:
    """The most memory this process has held at once, in MB; where Linux does not tell, its parent's may count too."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.findall(r"VmHWM:\s+(\d+) kB", status.read_text())[0]) / 1024
    import resource

    # macOS counts bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _measure(asked: Mapping[str, Any]) -> dict[str, float | None]:
    started = time.perf_counter()
    from haechi.guards import load_guard

    guard, queries = load_guard(asked["spec"]), asked["queries"]
    guard.check(queries[:1])
    start = time.perf_counter() - started
    for query in queries[:_WARM_UP]:
        guard.check([query])
    times = []
    for query in queries:
        begun = time.perf_counter()
        guard.check([query])
        times.append(time.perf_counter() - begun)
    begun = time.perf_counter()
    guard.check(queries)
    together = time.perf_counter() - begun
    from haechi.remote import percentile

    return {
        "start_s": start,
        "p50_ms": percentile(times, 0.5),
        "p99_ms": percentile(times, 0.99),
        "rows_per_s": len(queries) / together,
        "memory_mb": peak_memory(),
    }


if __name__ == "__main__":
    print(json.dumps(_measure(json.load(sys.stdin))))
