"""An exported BERT as a trainable one again: `haechi-mini` ships as int8 ONNX, and a user's own policy starts best from
what it knows. Weights come back as the graph has them: from int8, each within half a quantisation step."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from tokenizers import Tokenizer
from transformers import BertConfig, BertLMHeadModel, PreTrainedTokenizerFast

from haechi.errors import ModelError
from haechi.modelfolder import read_sheet, require_seal

_NAMES = {"cls": "[CLS]", "sep": "[SEP]", "pad": "[PAD]", "unk": "[UNK]", "mask": "[MASK]"}


def restored(folder: Path, dropout: float | None) -> tuple[BertLMHeadModel, PreTrainedTokenizerFast]:
    """The model and tokenizer of a folder made by `haechi export`; `dropout` None is BERT's own 0.1.

    Raises ModelError for a folder that is incomplete, or whose graph is not a BERT of ours.
    """
    require_seal(folder, read_sheet(folder))
    body, head = _Graph(folder / "model.onnx"), _Graph(folder / "head.onnx")
    try:
        model = _model(body, head, dropout)
    except (KeyError, RuntimeError):
        raise ModelError(
            f"{folder} cannot be trained on: only exported BERT models can; start from its torch folder"
        ) from None
    core = Tokenizer.from_file(str(folder / "tokenizer.json"))
    named = {f"{name}_token": token for name, token in _NAMES.items() if core.token_to_id(token) is not None}
    return model, PreTrainedTokenizerFast(tokenizer_object=core, **named)


class _Graph:
    """A graph's constants by the name of the node that reads them."""

    def __init__(self, path: Path) -> None:
        self.graph = onnx.load(path).graph
        self.constants = {constant.name: numpy_helper.to_array(constant) for constant in self.graph.initializer}
        self._nodes = {node.name: node for node in self.graph.node}

    def weight(self, *names: str) -> torch.Tensor:
        """The constant that the first of these nodes there is reads, dequantised when it is int8."""
        node = next(self._nodes[name] for name in names if name in self._nodes)
        name = next(name for name in node.input if name in self.constants)
        plain = name.removesuffix("_quantized")
        value = self.constants[name].astype(np.float32)
        if plain != name:
            value = (value - self.constants[f"{plain}_zero_point"]) * self.constants[f"{plain}_scale"]
        return torch.from_numpy(np.ascontiguousarray(value))

    def dense(self, path: str) -> dict[str, torch.Tensor]:
        """Weight [out, in] and bias of a linear layer."""
        return {
            "weight": self.weight(f"{path}/MatMul_quant", f"{path}/MatMul").T.contiguous(),
            "bias": self.weight(f"{path}/Add"),
        }

    def normalisation(self, path: str) -> dict[str, torch.Tensor]:
        """Weight and bias of a layer normalisation."""
        node = self._nodes[f"{path}/LayerNormalization"]
        return {
            part: torch.from_numpy(self.constants[name].copy())
            for part, name in zip(("weight", "bias"), node.input[1:], strict=True)
        }

    def epsilon(self) -> float:
        """What its layer normalisations add to the variance."""
        node = next(node for node in self.graph.node if node.op_type == "LayerNormalization")
        return float(next(attribute.f for attribute in node.attribute if attribute.name == "epsilon"))


def _model(body: _Graph, head: _Graph, dropout: float | None) -> BertLMHeadModel:
    past = [item for item in body.graph.input if item.name.startswith("past_key_")]
    if not past:
        raise KeyError("past_key_0")
    heads, width = (past[0].type.tensor_type.shape.dim[axis].dim_value for axis in (1, 3))
    state = _layers(body, len(past), heads * width, width**-0.5)
    for table in ("position_embeddings", "token_type_embeddings"):
        state[f"bert.embeddings.{table}.weight"] = body.weight(f"/model/bert/embeddings/{table}/Gather")
    # Input and output table are one in BERT; the head's copy has a scale per row where the other has one in all.
    words = head.weight("/MatMul_quant", "/MatMul").T.contiguous()
    state["bert.embeddings.word_embeddings.weight"] = state["cls.predictions.decoder.weight"] = words
    state["cls.predictions.bias"] = state["cls.predictions.decoder.bias"] = torch.from_numpy(
        head.constants["bias"].copy()
    )
    rates = {} if dropout is None else dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), dropout)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=heads * width,
        num_hidden_layers=len(past),
        num_attention_heads=heads,
        intermediate_size=len(state["bert.encoder.layer.0.intermediate.dense.bias"]),
        max_position_embeddings=len(state["bert.embeddings.position_embeddings.weight"]),
        type_vocab_size=len(state["bert.embeddings.token_type_embeddings.weight"]),
        layer_norm_eps=body.epsilon(),
        is_decoder=True,
        **rates,
    )
    model = BertLMHeadModel(config)
    model.load_state_dict(state)
    return model


def _layers(body: _Graph, count: int, hidden: int, scaling: float) -> dict[str, torch.Tensor]:
    """Everything but the tables, undoing what the export fuses (`haechi.export`)."""
    state: dict[str, torch.Tensor] = {}

    def put(name: str, values: Mapping[str, torch.Tensor]) -> None:
        state.update({f"{name}.{part}": value for part, value in values.items()})

    put("bert.embeddings.LayerNorm", body.normalisation("/model/bert/embeddings/LayerNorm"))
    put("cls.predictions.transform.dense", body.dense("/model/cls/predictions/transform/dense"))
    put("cls.predictions.transform.LayerNorm", body.normalisation("/model/cls/predictions/transform/LayerNorm"))
    for index in range(count):
        name, path = f"bert.encoder.layer.{index}", f"/model/bert/encoder/layer.{index}"
        fused = body.dense(f"{path}/attention/self/product")
        for number, (part, scale) in enumerate((("query", scaling), ("key", 1.0), ("value", 1.0))):
            rows = slice(number * hidden, (number + 1) * hidden)
            put(f"{name}.attention.self.{part}", {key: value[rows] / scale for key, value in fused.items()})
        # The last layer's attention output is wrapped once more.
        inner = f"{path}/attention/output/output" if index == count - 1 else f"{path}/attention/output"
        put(f"{name}.attention.output.dense", body.dense(f"{inner}/dense"))
        put(f"{name}.attention.output.LayerNorm", body.normalisation(f"{inner}/LayerNorm"))
        put(f"{name}.intermediate.dense", body.dense(f"{path}/intermediate/dense"))
        put(f"{name}.output.dense", body.dense(f"{path}/output/dense"))
        put(f"{name}.output.LayerNorm", body.normalisation(f"{path}/output/LayerNorm"))
    return state
