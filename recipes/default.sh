#!/usr/bin/env bash
# The one record that makes haechi-mini, the embedded default, from text/, train/ and corpus/.
# Run it in the project's root with HAECHI_DATA naming the local mirror of the public sets (default ../shared/data);
# about three and a half hours on two CPU cores. Killed anywhere, it goes on from the last checkpoint when started again.
set -euo pipefail
haechi curate configs/curate/instruction.yaml
haechi curate configs/curate/safety.yaml
haechi train configs/train/start.yaml
haechi train configs/train/mini.yaml
haechi export runs/haechi-mini/model src/haechi/data/haechi-mini
haechi evaluate configs/evaluate/mini.yaml
