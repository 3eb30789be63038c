"""Haechi as a target of garak's `function` generator: a prompt is judged, the reply is the verdict in one word."""

from functools import cache

import haechi

load = cache(haechi.load)


def verdict(prompt: str, point: str = "balanced") -> list[str | None]:
    """Judge one prompt: `unsafe`, `safe`, or None when it cannot be judged, which garak leaves out."""
    unsafe = load(point=point).check([prompt])[0].unsafe
    return [None if unsafe is None else "unsafe" if unsafe else "safe"]
