#!/usr/bin/env bash
# The one record that makes haechi-mini, the embedded default, from text/, train/ and corpus/.
# Run it in the project's root with HAECHI_DATA naming the local mirror of the public sets (default ../shared/data);
# about four hours on two CPU cores. Killed anywhere, it goes on from the last checkpoint when started again.
set -euo pipefail
haechi curate configs/curate/instruction.yaml
haechi curate configs/curate/safety.yaml
haechi train configs/train/start.yaml
haechi train configs/train/mini.yaml
haechi curate configs/curate/safety.yaml output=runs/data/further sources.0.weight=2 sources.1.weight=2
haechi train configs/train/further.yaml
haechi export runs/further/haechi-mini/model src/haechi/data/haechi-mini
# The points were fitted to the float model: fit them to the integers that are shipped.
haechi calibrate runs/data/further/valid.jsonl --model src/haechi/data/haechi-mini --output src/haechi/data/haechi-mini
haechi evaluate configs/evaluate/mini.yaml
