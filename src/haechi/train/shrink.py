"""A smaller model of the same family, started from what of the larger one fits."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from haechi.errors import ModelError
from haechi.train.config import Shrink

_HEAD = 32
"""Width of an attention head in a narrowed model."""


def shrunk(model: Any, shrink: Shrink) -> Any:
    """The first layers of `model` when its width stays; a narrower one gets the principal components of the embedding
    table, and fresh layers.

    Raises ModelError when there is nothing to shrink: more layers or a greater width than the model has.
    """
    shape = copy.deepcopy(model.config)
    width, layers = shrink.hidden or shape.hidden_size, shrink.layers or shape.num_hidden_layers
    if width > shape.hidden_size or layers > shape.num_hidden_layers:
        raise ModelError(
            f"shrink asks for {layers} layers of width {width}; the base has {shape.num_hidden_layers} of "
            f"{shape.hidden_size}"
        )
    if width % _HEAD and width != shape.hidden_size:
        raise ModelError(f"shrink.hidden must be a multiple of {_HEAD}, not {width}")
    narrow = width < shape.hidden_size
    shape.num_hidden_layers = layers
    if narrow:
        shape.intermediate_size = shape.intermediate_size * width // shape.hidden_size
        shape.hidden_size, shape.num_attention_heads = width, width // _HEAD
        if hasattr(shape, "num_key_value_heads"):
            shape.num_key_value_heads = shape.num_attention_heads
        if hasattr(shape, "head_dim"):
            shape.head_dim = _HEAD
    small = AutoModelForCausalLM.from_config(shape)
    ours = small.state_dict()
    small.load_state_dict(
        {name: value for name, value in model.state_dict().items() if name in ours and ours[name].shape == value.shape},
        strict=False,
    )
    if narrow:
        with torch.no_grad():
            for mine, theirs in zip(embedding_tables(small), embedding_tables(model), strict=True):
                mine.copy_(_components(theirs, width))
    return small


def embedding_tables(model: Any) -> list[torch.Tensor]:
    """Input embeddings, and output embeddings where they are another table."""
    tables = [model.get_input_embeddings().weight]
    if model.get_output_embeddings().weight is not tables[0]:
        tables.append(model.get_output_embeddings().weight)
    return tables


def _components(table: torch.Tensor, width: int) -> torch.Tensor:
    """[rows, width] principal components, scaled to the table's own spread."""
    centred = table - table.mean(0)
    _, _, directions = torch.linalg.svd(centred.T @ centred)
    kept: torch.Tensor = centred @ directions[:width].T
    return kept * (table.std() / kept.std())
