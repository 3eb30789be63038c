"""PyTorch: any Hugging Face causal LM folder, on a GPU when there is one."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.utils import logging as transformers_logging

from haechi.engines import Step
from haechi.errors import ModelError
from haechi.template import Bools, Ints


class TorchEngine:
    """A model folder written by `haechi train`."""

    def __init__(self, folder: Path, *, threads: int | None = None) -> None:
        if threads:
            torch.set_num_threads(threads)
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.bfloat16 if self._device.type == "cuda" else torch.float32
        try:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
        except Exception as error:
            # transformers and safetensors raise many kinds for a damaged folder; all mean the same to the user.
            reason = " ".join(str(error).split())[:200]
            raise ModelError(f"{folder} cannot be loaded, it may be incomplete or truncated: {reason}") from None
        self._model = model.to(self._device).eval()

    @torch.inference_mode()
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
        """See `Engine.forward`."""
        # The model writes the new columns into the cache it is given.
        cache = cache or DynamicCache(config=self._model.config)
        output = self._model(
            input_ids=self._put(ids),
            position_ids=self._put(positions),
            attention_mask=self._put(mask[:, None]),
            logits_to_keep=self._put(keep),
            use_cache=True,
            **{cache_argument(self._model): cache},
        )
        logits = output.logits if candidates is None else output.logits[..., self._put(candidates)]
        return Step(logits.float().cpu().numpy(), cache)

    def _put(self, array: Ints | Bools) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device)


def cache_argument(model: Any) -> str:
    """What this release of transformers calls the cache: `cache` since 5.24, `past_key_values` before."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
