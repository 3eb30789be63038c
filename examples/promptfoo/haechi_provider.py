"""Haechi as a promptfoo provider: the output is the safeguard answer, `guardrails` the verdict."""

from functools import cache
from typing import Any

import haechi

load = cache(haechi.load)


def call_api(prompt: str, options: dict[str, Any], context: dict[str, Any]) -> dict[str, Any]:
    """Judge one prompt; `point` in the provider's `config` names the operating point."""
    point = options.get("config", {}).get("point", "balanced")
    answer = load(point=point).answer([prompt])[0]
    verdict = answer.verdict
    if verdict.unsafe is None:
        return {"error": verdict.error}  # promptfoo counts the row as an error, neither passed nor failed
    return {
        "output": answer.text or "safe",
        "guardrails": {
            "flagged": verdict.unsafe,
            "flaggedInput": verdict.unsafe,
            "reason": f"{verdict.category} ({verdict.score:.3f})" if verdict.unsafe else None,
        },
        "metadata": verdict.model_dump(),
    }
