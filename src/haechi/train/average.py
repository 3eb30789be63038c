"""Averages of weights: over a stage's steps, and of what a stage began with and what it made of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch


class Average:
    """Exponential moving average of a model's trained weights (Polyak and Juditsky 1992; decay warmed up as in
    TensorFlow's ExponentialMovingAverage). A decay of 0 is the weights themselves."""

    def __init__(self) -> None:
        self._parameters: list[torch.nn.Parameter] = []
        self._weights: list[torch.Tensor] = []
        self._decay, self._updates = 0.0, 0

    def start(self, model: torch.nn.Module, decay: float) -> None:
        """Average this model's weights from where they are now."""
        self._decay, self._updates = decay, 0
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad] if decay else []
        self._weights = [parameter.detach().clone() for parameter in self._parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights after a step."""
        self._updates += 1
        if self._weights:
            decay = min(self._decay, (1 + self._updates) / (10 + self._updates))
            torch._foreach_lerp_(self._weights, list(self._parameters), 1 - decay)

    @contextmanager
    @torch.no_grad()
    def applied(self) -> Iterator[None]:
        """Inside it the model has the averaged weights."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        for parameter, average in zip(self._parameters, self._weights, strict=True):
            kept = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(kept)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"weights": self._weights, "updates": self._updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint of the same stage."""
        self._updates = state["updates"]
        for average, saved in zip(self._weights, state["weights"], strict=True):
            average.copy_(saved)


Weights = Mapping[str, torch.Tensor]


def mixed(before: Weights, after: Weights, keep: float) -> dict[str, torch.Tensor]:
    """The weights `keep` of the way back from `after` to `before` (WiSE-FT, arXiv 2109.01903); counters as `after`."""
    return {
        name: torch.lerp(weight, before[name].to(weight), keep) if weight.is_floating_point() else weight
        for name, weight in after.items()
    }
