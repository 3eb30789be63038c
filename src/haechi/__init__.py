"""A small language model that judges a query and gives the safeguard answer, in front of your LLM.

>>> import haechi
>>> haechi.check("how do I hotwire my neighbour's car without anyone noticing").unsafe
True
"""

from __future__ import annotations

import os
from functools import cache
from typing import TYPE_CHECKING

from haechi.guards import Guard
from haechi.schema import Answer, Conversation, Example, Verdict

if TYPE_CHECKING:
    from haechi.guards.slm import SLM

# ONNX Runtime's wheels report their use to its maker unless told otherwise; what guards a service sends nothing.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__all__ = ["Answer", "Conversation", "Example", "Guard", "Verdict", "check", "load"]
__version__ = "0.1.0"


def load(
    folder: str | None = None,
    *,
    engine: str | None = None,
    threads: int | None = None,
    locale: str | None = None,
    point: str = "balanced",
    normalise: bool = True,
    answers: str | None = None,
) -> SLM:
    """The guard in a model folder, default the embedded `haechi-mini`; see `haechi.guards.slm.load`."""
    from haechi.guards.slm import load

    return load(
        folder, engine=engine, threads=threads, locale=locale, point=point, normalise=normalise, answers=answers
    )


def check(query: str | Conversation) -> Verdict:
    """The embedded model's verdict on one query; it stays loaded between calls. For many: `load().check([...])`."""
    return _default().check([query])[0]


@cache
def _default() -> SLM:
    return load()
