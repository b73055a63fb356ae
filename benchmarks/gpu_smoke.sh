#!/usr/bin/env bash
# The first run on a machine with one Hopper GPU: does transformer-engine work there, and does Phidias train through it.
#
#     benchmarks/gpu_smoke.sh            # GPU_KIT=<folder> where the kit is not in .gpu_kit/
#
# NOT YET RUN ON A GPU (as of 2026-11-21): none could be had. Rehearsed without one by `python -m tests.gpu.test_smoke --cpu`.
#
# Needs: Python 3.11 or newer, torch with CUDA, cuDNN 9, and what the kit's env.sh installs without a network (see its README.md):
# transformer-engine, megatron-core 0.16.1, pydantic, omegaconf, hydra-core, rich. Besides these numpy, packaging, setuptools
# (torch imports it) and psutil: megatron-core's checkpoint writer hangs without psutil, so its absence stops this script.
# Not needed: pytest (used where it is there), xxhash, pyyaml, tokenizers, pyarrow. About 3 minutes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
kit=${GPU_KIT:-.gpu_kit}
[ -f "$kit/env.sh" ] || { echo "no GPU kit in $kit; set GPU_KIT to the folder with env.sh" >&2; exit 1; }
. "$kit/env.sh"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
python3 -c 'import psutil, torch; assert torch.cuda.is_available(), "no CUDA device"; print(torch.cuda.get_device_name())'
python3 -W ignore "$kit/te_smoke.py"
if python3 -c 'import pytest' 2>/dev/null; then
  python3 -m pytest tests/gpu -m gpu -rs -s  # -s: the step times and losses are part of the answer
else
  python3 -m tests.gpu.test_smoke
fi
