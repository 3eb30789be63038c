"""`haechi export MODEL OUTPUT`: a trained folder becomes ONNX graphs with dynamic shapes and a key-value cache.

`model.onnx` runs everything up to the head, and the head over a few candidate ids (all a verdict needs); `head.onnx` is
the head over the whole vocabulary, for writing. int8: weights per channel, activations quantised at run time.
"""

from __future__ import annotations

import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from transformers import AutoModelForCausalLM, DynamicCache

from haechi import approved, spelling
from haechi.card import model_card
from haechi.engines.torch import cache_argument
from haechi.errors import ConfigError, ModelError
from haechi.modelfolder import read_sheet, sealed, write_sheet
from haechi.store import write_text

_DOMAIN, _RUNTIME = "haechi", "com.microsoft"
"""Domains of our own nodes while a graph is traced, and of ONNX Runtime's."""


class _Pass:
    """What the parts of a streamlined model share in one pass."""

    keep: torch.Tensor
    """Positions the last layer is to compute."""
    past: list[torch.Tensor]
    """Keys and values of each layer so far, in turns."""
    present: list[torch.Tensor]
    """The same with this pass's own; filled layer by layer."""


class _Attention(torch.autograd.Function):
    """Multi-head attention over past and new keys, as one node of the graph."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor,
        past_key: torch.Tensor, past_value: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
        """`query`, `key`, `value` [rows, columns, width], additive `mask` [rows, 1, queries, all], past [rows, heads,
        past, head width]; gives the output and all keys and values."""
        shape = (past_key.shape[1], past_key.shape[3])
        query, key, value = (part.view(*part.shape[:2], *shape).transpose(1, 2) for part in (query, key, value))
        key, value = torch.cat([past_key, key], 2), torch.cat([past_value, value], 2)
        shares = torch.softmax(query @ key.transpose(2, 3) + mask, -1)
        return (shares @ value).transpose(1, 2).flatten(2), key, value

    @staticmethod
    def symbolic(g: Any, *inputs: Any) -> Any:
        """A node of a name of its own; `_fused` gives it ONNX Runtime's."""
        outputs = g.op(f"{_DOMAIN}::Attention", *inputs, outputs=3)
        for output, axes in zip(outputs, (3, 4, 4), strict=True):
            output.setType(inputs[4].type().with_sizes([None] * axes))
        return outputs


class _SelfAttention(torch.nn.Module):
    """BERT's self-attention as one product for queries, keys and values, their scale folded into the weights, and one
    node for the rest. In the last layer only the kept positions ask; all still answer."""

    def __init__(self, attention: Any, shared: _Pass, *, last: bool) -> None:
        super().__init__()
        parts = (attention.query, attention.key, attention.value)
        scales = (attention.scaling, 1.0, 1.0)
        self.product = torch.nn.Linear(parts[0].in_features, 3 * attention.all_head_size)
        with torch.no_grad():
            for name in ("weight", "bias"):
                fused = torch.cat([getattr(part, name) * scale for part, scale in zip(parts, scales, strict=True)])
                getattr(self.product, name).copy_(fused)
        self._width, self._layer, self._shared, self._last = attention.all_head_size, attention.layer_idx, shared, last

    def forward(self, hidden: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        query, key, value = self.product(hidden).split(self._width, -1)
        if self._last:
            query, attention_mask = query[:, self._shared.keep], attention_mask[:, :, self._shared.keep]
        past = self._shared.past[2 * self._layer : 2 * self._layer + 2]
        output, *present = _Attention.apply(query, key, value, attention_mask, *past)  # type: ignore[no-untyped-call]
        self._shared.present += present
        return output, None


class _KeptOutput(torch.nn.Module):
    """The last layer's attention output, its residual cut to the kept positions."""

    def __init__(self, output: Any, shared: _Pass) -> None:
        super().__init__()
        self.output, self._shared = output, shared

    def forward(self, hidden: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.output(hidden, residual[:, self._shared.keep])
        return result


def _streamline(model: Any) -> _Pass | None:
    """Rewrite a BERT for the graph: one product and one attention node a layer, and a last layer that computes no more
    than is read. Other architectures stay as they are; returns None for them."""
    if model.config.model_type != "bert":
        return None
    shared, layers = _Pass(), model.bert.encoder.layer
    for layer in layers:
        layer.attention.self = _SelfAttention(layer.attention.self, shared, last=layer is layers[-1])
    layers[-1].attention.output = _KeptOutput(layers[-1].attention.output, shared)
    return shared


class _Body(torch.nn.Module):
    """A causal LM with its cache as plain tensors and its head cut off."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self._cache = cache_argument(model)
        self.shared = _streamline(model)
        self.head = model.get_output_embeddings()
        self._weight, self._bias = self.head.weight, self.head.bias
        # With an identity for a head the model returns what the head would have been given.
        self.head.forward = lambda hidden: hidden

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        mask: torch.Tensor,
        keep: torch.Tensor,
        candidates: torch.Tensor,
        *past: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        additive = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
        inputs = {"input_ids": input_ids, "position_ids": position_ids, "attention_mask": additive}
        if self.shared:
            self.shared.keep, self.shared.past, self.shared.present = keep, list(past), []
            hidden = self.model(**inputs, use_cache=False).logits
            present = self.shared.present
        else:
            cache = DynamicCache(list(zip(past[0::2], past[1::2], strict=True)))
            hidden = self.model(**inputs, use_cache=True, logits_to_keep=keep, **{self._cache: cache}).logits
            present = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
        logits = hidden @ self._weight[candidates].T
        if self._bias is not None:
            logits = logits + self._bias[candidates]
        return (logits, hidden, *present)


def run(model: Path, output: Path, precision: str, report: Callable[[str], None] = print) -> Path:
    """Write the ONNX folder and its model card. Raises ModelError for a folder without weights."""
    if precision not in ("int8", "fp32"):
        raise ConfigError(f"precision must be int8 or fp32, not {precision!r}")
    sheet = read_sheet(model).model_copy(update={"precision": precision})
    try:
        network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, local_files_only=True).eval()
    except (OSError, ValueError) as error:
        raise ModelError(f"{model} cannot be loaded: {' '.join(str(error).split())[:200]}") from None
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for name, write in (("head.onnx", _write_head), ("model.onnx", _write_body)):
            plain = Path(folder) / name
            write(network, plain)
            _finish(plain, output / name, precision)
            report(f"{name}: {(output / name).stat().st_size / 1e6:.1f} MB")
    for file in ("tokenizer.json", spelling.FILE, approved.FILE):
        if (model / file).exists():
            shutil.copyfile(model / file, output / file)
    if (output / approved.FILE).exists():
        approved.read_approved(output / approved.FILE, sheet.policy())
    write_sheet(output, sealed(output, sheet))
    write_text(output / "README.md", model_card(sheet))
    return output


def _write_head(network: Any, path: Path) -> None:
    head = network.get_output_embeddings()
    hidden = torch.zeros(1, 1, head.weight.shape[1])
    linear = torch.nn.Linear(head.weight.shape[1], head.weight.shape[0], bias=head.bias is not None)
    linear.load_state_dict(head.state_dict())
    _export(
        linear,
        (hidden,),
        path,
        ["hidden"],
        ["logits"],
        {"hidden": {0: "rows", 1: "kept"}, "logits": {0: "rows", 1: "kept"}},
    )


def _write_body(network: Any, path: Path) -> None:
    body = _Body(network)
    config = network.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    names = [f"{kind}_{layer}" for layer in range(config.num_hidden_layers) for kind in ("key", "value")]
    past = tuple(torch.zeros(2, heads, 3, width) for _ in names)
    example = (
        torch.zeros(2, 5, dtype=torch.int64),
        torch.arange(5).repeat(2, 1),
        torch.ones(2, 1, 5, 8, dtype=torch.bool),
        torch.arange(2),
        torch.arange(4),
        *past,
    )
    inputs = ["input_ids", "position_ids", "mask", "keep", "candidates", *(f"past_{name}" for name in names)]
    outputs = ["logits", "hidden", *(f"present_{name}" for name in names)]
    axes = {
        "input_ids": {0: "rows", 1: "new"},
        "position_ids": {0: "rows", 1: "new"},
        "mask": {0: "rows", 2: "new", 3: "all"},
        "keep": {0: "kept"},
        "candidates": {0: "candidates"},
        "logits": {0: "rows", 1: "kept", 2: "candidates"},
        "hidden": {0: "rows", 1: "kept"},
        **{f"past_{name}": {0: "rows", 2: "past"} for name in names},
        **{f"present_{name}": {0: "rows", 2: "all"} for name in names},
    }
    _export(body, example, path, inputs, outputs, axes)
    if body.shared:
        onnx.save(_fused(onnx.load(path)), path)


def _export(
    module: torch.nn.Module,
    example: tuple[torch.Tensor, ...],
    path: Path,
    inputs: list[str],
    outputs: list[str],
    axes: dict[str, dict[int, str]],
) -> None:
    # The tracing exporter follows the cache's plain tensors through any architecture; it is deprecated, not removed,
    # and the graph it writes is checked against torch by a test.
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module,
            example,
            str(path),
            input_names=inputs,
            output_names=outputs,
            dynamic_axes=axes,
            opset_version=18,
            dynamo=False,
            do_constant_folding=True,
            custom_opsets={_DOMAIN: 1} if getattr(module, "shared", None) else None,
        )


def _fused(model: onnx.ModelProto) -> onnx.ModelProto:
    """Our attention nodes as ONNX Runtime's MultiHeadAttention, whose inputs between value and mask are left out."""
    shapes = {item.name: item.type.tensor_type.shape.dim for item in model.graph.input}
    for node in model.graph.node:
        if node.domain == _DOMAIN:
            query, key, value, mask, *past = node.input
            heads = shapes[past[0]][1].dim_value
            del node.input[:], node.attribute[:]
            node.input.extend([query, key, value, "", "", mask, *past])
            node.attribute.extend(
                [onnx.helper.make_attribute("num_heads", heads), onnx.helper.make_attribute("scale", 1.0)]
            )
            node.op_type, node.domain = "MultiHeadAttention", _RUNTIME
    for item in model.opset_import:
        if item.domain == _DOMAIN:
            item.domain = _RUNTIME
    return model


def _finish(source: Path, target: Path, precision: str) -> None:
    """Quantise if asked, and move into place only when whole."""
    part = target.with_suffix(".part")
    if precision == "int8":
        quantize_dynamic(
            source,
            part,
            per_channel=True,
            weight_type=QuantType.QInt8,
            op_types_to_quantize=["MatMul", "Gather", "Gemm"],
        )
    else:
        onnx.save(onnx.load(source), part)
    part.replace(target)
