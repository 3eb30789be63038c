"""Engines: token ids in, logits out. They know nothing of safety; `onnx` is the default, `torch` runs any causal LM."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from haechi.errors import MissingExtra, ModelError
from haechi.template import Bools, Floats, Ints


class Step(NamedTuple):
    """The result of one forward pass."""

    logits: Floats
    """[rows, kept columns, candidates]."""
    cache: Any
    """Keys and values of every column so far; opaque, to be passed to the next call."""


class Engine(Protocol):
    """One model in memory."""

    def forward(
        self,
        ids: Ints,
        positions: Ints,
        mask: Bools,
        keep: Ints,
        *,
        candidates: Ints | None = None,
        cache: Any = None,
    ) -> Step:
        """Run the model on new columns.

        `ids` and `positions` are [rows, new]; `mask` is [rows, new, past + new], true where a column may be seen;
        `keep` [kept] are the new columns whose logits are wanted, `candidates` the ids they are wanted for (default
        the whole vocabulary); `cache` comes from the previous call.
        """
        ...


_ENGINES = {"onnx": ("haechi.engines.onnx:OnnxEngine", None), "torch": ("haechi.engines.torch:TorchEngine", "train")}


def load_engine(folder: Path, name: str | None = None, *, threads: int | None = None) -> Engine:
    """Load a model folder: with ONNX Runtime when it holds `model.onnx`, else with torch, or as `name` says.

    Raises ModelError for a missing or damaged file, MissingExtra when torch is needed and not installed.
    """
    name = name or ("onnx" if (folder / "model.onnx").exists() else "torch")
    if name not in _ENGINES:
        raise ModelError(f"unknown engine {name!r}; known: {', '.join(_ENGINES)}")
    target, extra = _ENGINES[name]
    module, _, attribute = target.partition(":")
    try:
        kind = getattr(importlib.import_module(module), attribute)
    except ImportError:
        raise MissingExtra(extra or "train", f"the engine {name!r}") from None
    engine: Engine = kind(folder, threads=threads)
    return engine
