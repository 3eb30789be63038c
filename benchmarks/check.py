"""Speed and memory of `haechi check` with the default model: `python benchmarks/check.py`; the last line is JSON.

One thread unless `--threads N`. Beside the throughput stand the useful operations per second (two for each weight of
the graph's matrix products and each token that is not padding) and the machine's own rate for one large matrix product
in the same runtime, fp32 and int8, so that figures of different machines can be read together; and a classifier of the
size that other guards run, measured in the same process.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

QUERY = (
    "my neighbour leaves his car unlocked every night and I would like to know how people usually get one started "
    "without the key and without ever setting off its alarm"
)


SLIPS = QUERY.replace("neighbour", "nieghbour").replace("leaves", "leavs").replace("started", "strated")


def timed(check: Callable[[Sequence[str]], object], query: str, rounds: int = 300) -> list[float]:
    """Milliseconds of each of so many single checks, after a few that warm up."""
    times = []
    for number in range(20 + rounds):
        started = time.perf_counter()
        check([query])
        if number >= 20:
            times.append((time.perf_counter() - started) * 1e3)
    return times


class Stopwatch:
    """An engine that adds up its own time."""

    def __init__(self, engine: Any) -> None:
        self._engine, self.seconds = engine, 0.0

    def forward(self, *arguments: Any, **settings: Any) -> Any:
        """See `haechi.engines.Engine.forward`."""
        started = time.perf_counter()
        try:
            return self._engine.forward(*arguments, **settings)
        finally:
            self.seconds += time.perf_counter() - started


def percentile(values: list[float], share: float) -> float:
    """The value below which `share` of the values lie."""
    return float(np.quantile(values, share))


def matmul_rate(threads: int, precision: str, size: int = 1024) -> float:
    """Billion operations per second of one matrix product in ONNX Runtime; int8 quantises its activations as we do."""
    import onnx
    import onnxruntime as ort
    from onnx import helper, numpy_helper
    from onnxruntime.quantization import QuantType, quantize_dynamic

    weight = np.random.default_rng(0).random((size, size), np.float32)
    shape = [size, size]
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "product",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(weight, "w")],
    )
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "product.onnx"
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
        if precision == "int8":
            quantize_dynamic(path, path, per_channel=True, weight_type=QuantType.QInt8)
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {"x": weight}
    session.run(None, feed)
    started, rounds = time.perf_counter(), 10
    for _ in range(rounds):
        session.run(None, feed)
    return 2 * size**3 * rounds / (time.perf_counter() - started) / 1e9


def deberta_p50(threads: int, tokens: int) -> float:
    """Median milliseconds of one query of `tokens` in an ONNX classifier of DeBERTa-v3-base's shape, random weights:
    what LLM Guard's and Prompt Guard's input scanners run, in the same runtime and in fp32 as they are published."""
    import onnxruntime as ort
    import torch
    from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

    shape = DebertaV2Config(
        vocab_size=128100, hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072,
        relative_attention=True, position_buckets=256, norm_rel_ebd="layer_norm", share_att_key=True,
        pos_att_type=["p2c", "c2p"], type_vocab_size=0, position_biased_input=False, max_relative_positions=-1,
    )  # fmt: skip
    model = DebertaV2ForSequenceClassification(shape).eval()
    ids = torch.randint(5, 1000, (1, tokens))
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        torch.onnx.export(model, (ids, torch.ones_like(ids)), path, input_names=["ids", "mask"], dynamo=False)
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {"ids": ids.numpy(), "mask": np.ones((1, tokens), np.int64)}
    times = []
    for _ in range(30):
        started = time.perf_counter()
        session.run(None, feed)
        times.append((time.perf_counter() - started) * 1e3)
    return percentile(times[5:], 0.5)


def product_weights(path: Path) -> int:
    """Weights that every token is multiplied with: those of the graph's matrix products."""
    import onnx

    graph = onnx.load(path).graph
    sizes = {tensor.name: int(np.prod(tensor.dims)) for tensor in graph.initializer if len(tensor.dims) == 2}
    products = [node for node in graph.node if node.op_type in ("MatMul", "MatMulInteger", "Gemm")]
    return sum(sizes.get(name, 0) for node in products for name in node.input)


def processor() -> str:
    """Its name and the instructions that decide the speed of small integers."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    known = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    units = [unit for unit in ("avx512_vnni", "avx512_bf16", "amx_int8") if unit in known.get("flags", "").split()]
    return " ".join([known.get("model name", platform.machine()), *units])


def resident_megabytes() -> float:
    """Resident memory of this process."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]) / 1000


def cold_start() -> float:
    """Seconds from starting a process to its first verdict printed; the best of five."""
    times = []
    for _ in range(5):
        started = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "haechi.cli", "check", "--threads", "1", "hello"], capture_output=True, check=True
        )
        times.append(time.perf_counter() - started)
    return min(times)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--model", default=None)
    arguments = parser.parse_args()
    os.environ["OPENBLAS_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = str(arguments.threads)

    from haechi.guards.slm import load
    from haechi.modelfolder import default_model

    folder = Path(arguments.model) if arguments.model else default_model()
    guard = load(folder, threads=arguments.threads)
    tokens = len(guard.template.encode(QUERY))
    times, slips = timed(guard.check, QUERY), timed(guard.check, SLIPS)
    guard._engine = watch = Stopwatch(engine := guard._engine)
    started = time.perf_counter()
    timed(guard.check, QUERY)
    share = watch.seconds / (time.perf_counter() - started)
    guard._engine = engine
    memory = resident_megabytes()
    corpus = [f"{QUERY[: 20 + index % 110]} {index}" for index in range(2000)]
    started = time.perf_counter()
    guard.check(corpus)
    seconds = time.perf_counter() - started
    operations = 2 * product_weights(folder / "model.onnx") * sum(len(guard.template.encode(query)) for query in corpus)
    writer = load(folder, threads=arguments.threads, answers="written")
    writer.answer([QUERY], force=True)
    started = time.perf_counter()
    answers = writer.answer([QUERY] * 8, force=True)
    written = time.perf_counter() - started
    rival = deberta_p50(arguments.threads, tokens + 2)
    result = {
        "benchmark": "check", "processor": processor(), "cores": os.cpu_count(),
        "threads": arguments.threads, "query_tokens": tokens,
        "p50_ms": round(percentile(times, 0.5), 2), "p99_ms": round(percentile(times, 0.99), 2),
        "network_share": round(share, 2), "p50_ms_with_three_slips": round(percentile(slips, 0.5), 2),
        "resident_mb_after_checks": round(memory), "cold_start_s": round(cold_start(), 2),
        "batch_queries_per_s": round(len(corpus) / seconds), "useful_gops_per_s": round(operations / seconds / 1e9),
        **{f"matmul_{name}_gops_per_s": round(matmul_rate(arguments.threads, name)) for name in ("fp32", "int8")},
        "deberta_v3_base_p50_ms": round(rival, 1),
        "times_faster_than_deberta": round(rival / percentile(times, 0.5), 1),
        "answers_per_s": round(len(answers) / written, 1),
    }  # fmt: skip
    for name, value in result.items():
        print(f"{name:26} {value}", file=sys.stderr)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
