"""ONNX Runtime on the CPU: `model.onnx` (everything up to the head, and the head over few candidates) and `head.onnx`
(the head over the whole vocabulary, loaded when the first answer is written)."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import numpy as np
import onnxruntime as ort

from haechi.engines import Step
from haechi.errors import ModelError
from haechi.template import Bools, Floats, Ints

_NO_CANDIDATES = np.zeros(1, np.int64)
_SLOWER = ["SkipLayerNormFusion"]
"""The fused kernel takes four times as long as the addition and the normalisation it stands for (ONNX Runtime 1.32, one
query of 30 tokens)."""


class OnnxEngine:
    """A model exported by `haechi export`."""

    def __init__(self, folder: Path, *, threads: int | None = None) -> None:
        self._folder, self._threads = folder, threads
        self._body = self._session("model.onnx")
        past = [item for item in self._body.get_inputs() if item.name.startswith("past_")]
        self._past = [item.name for item in past]
        self._shape = [int(past[0].shape[axis]) for axis in (1, 3)] if past else [0, 0]

    def _session(self, name: str) -> ort.InferenceSession:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        # Spinning workers burn the cores of the service that calls us between two short queries.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if self._threads:
            options.intra_op_num_threads = self._threads
        path = self._folder / name
        if not path.is_file():
            raise ModelError(f"{path} is missing: the model folder is incomplete, copy or export it again")
        try:
            return ort.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"], disabled_optimizers=_SLOWER
            )
        except Exception as error:
            # ONNX Runtime has no public exception base; whatever it raises here means an unreadable file.
            first = str(error).strip().splitlines()[0][:200]
            raise ModelError(f"{path} cannot be loaded, it may be truncated: {first}") from None

    @cached_property
    def _head(self) -> ort.InferenceSession:
        return self._session("head.onnx")

    def forward(
        self,
        ids: Ints,
        positions: Ints,
        mask: Bools,
        keep: Ints,
        *,
        candidates: Ints | None = None,
        cache: list[Floats] | None = None,
    ) -> Step:
        """See `Engine.forward`."""
        if cache is None:
            empty = np.zeros((len(ids), self._shape[0], 0, self._shape[1]), np.float32)
            cache = [empty] * len(self._past)
        feed = {
            "input_ids": ids,
            "position_ids": positions,
            "mask": mask[:, None],
            "keep": keep,
            "candidates": _NO_CANDIDATES if candidates is None else candidates,
            **dict(zip(self._past, cache, strict=True)),
        }
        logits, hidden, *present = self._body.run(None, feed)
        if candidates is None:
            (logits,) = self._head.run(None, {"hidden": hidden})
        return Step(logits, present)
