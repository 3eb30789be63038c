#!/usr/bin/env bash
# The whole pipeline in minutes on a CPU, from the corpus alone: no public data, no language stage, a poor model.
set -euo pipefail
haechi curate configs/curate/tiny.yaml
haechi train configs/train/tiny.yaml
haechi export runs/tiny/model runs/tiny/onnx
haechi answer --model runs/tiny/onnx --input examples/queries.txt
