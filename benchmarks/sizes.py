"""The minimum-compute curve: quality of the ablation grid's sizes over the operations of one query and its latency.

`python benchmarks/sizes.py` builds each size of `configs/ablate/mini.yaml` untrained, exports it to int8 and times one
query on one thread, with nothing beside it: the grid's own latencies are of runs side by side. Quality is read from
`results/ablations/metrics.json`. Writes results/benchmarks/sizes.json and sizes.svg.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parent))

from check import QUERY, percentile, processor, product_weights, timed

from haechi import export
from haechi.ablate import AblateConfig, Variant
from haechi.config import load_config
from haechi.figures import Sized, size_plot
from haechi.guards.slm import load
from haechi.modelfolder import Sheet, sealed, write_sheet
from haechi.taxonomy import load_taxonomy
from haechi.train.config import TrainConfig
from haechi.train.model import load_base

FOLDER = Path("results/benchmarks")


def untrained(grid: AblateConfig, variant: Variant, folder: Path) -> Path:
    """An int8 export of the variant's shape; its weights are the base's, or random where it has none to give."""
    overrides = [*grid.words(variant, "train"), f"output={folder}"]
    config, taxonomy = load_config(TrainConfig, grid.train, overrides), load_taxonomy()
    base = load_base(config, taxonomy)
    model = folder / "model"
    base.model.save_pretrained(model)
    base.tokenizer.save_pretrained(model)
    sheet = Sheet(
        name=variant.name,
        base=config.base,
        taxonomy=taxonomy.model_dump(mode="json"),
        taxonomy_version=taxonomy.version,
        template=base.template.settings,
    )
    write_sheet(model, sealed(model, sheet))
    return export.run(model, folder / "int8", "int8", lambda line: None)


def main() -> None:
    """Measure, print and write."""
    grid = load_config(AblateConfig, Path("configs/ablate/mini.yaml"), [])
    (asked,) = (question for question in grid.questions if question.curve)
    stored = json.loads(Path("results/ablations/metrics.json").read_text(encoding="utf-8"))
    (known,) = (question for question in stored["questions"] if question["name"] == asked.name)
    sizes: list[dict[str, Any]] = []
    for variant, measured in zip(asked.variants, known["variants"], strict=True):
        assert variant.name == measured["name"]
        with tempfile.TemporaryDirectory() as folder:
            model = untrained(grid, variant, Path(folder))
            guard = load(model, threads=1)
            times = timed(guard.check, QUERY)
            weights = product_weights(model / "model.onnx")
        tokens = len(guard.template.encode(QUERY))
        sizes.append(
            {
                "name": variant.name,
                "parameters": measured["parameters"],
                "million_operations": round(2 * weights * tokens / 1e6, 1),
                "p50_ms": round(percentile(times, 0.5), 2),
                "figures": {name: measured["figures"][name] for name in grid.figures},
            }
        )
        print(variant.name, sizes[-1]["million_operations"], sizes[-1]["p50_ms"], file=sys.stderr)
    result = {"benchmark": "sizes", "processor": processor(), "threads": 1, "query_tokens": tokens, "sizes": sizes}
    (FOLDER / "sizes.json").write_text(json.dumps(result, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    models = [Sized(one["million_operations"], one["p50_ms"], one["figures"]) for one in sizes]
    size_plot(FOLDER / "sizes.svg", "million operations a query", models)


if __name__ == "__main__":
    main()
