#!/usr/bin/env bash
# All that a machine with one Hopper GPU is to be asked, in three commands of less than ten minutes each, by value:
#
#     benchmarks/gpu_session.sh checks     the kit, then the GPU tests: does transformer-engine work, does Phidias train by it
#     benchmarks/gpu_session.sh figures    python -m benchmarks.gpu: ceilings, ranks of the real job, layers, loop, saves, data
#     benchmarks/gpu_session.sh loss       FP8's loss beside bf16's, CPU beside GPU; then where the time of three ranks goes
#
# NOT YET RUN ON A GPU (as of 2026-11-22): none could be had. `benchmarks/gpu_session.sh rehearse` runs the same programs with
# tiny shapes on the CPU, without the kit and without FP8: 15 minutes on two busy cores.
#
# Before, on a machine with a network:
#   .gpu_kit/                                                 the kit (25 MB): env.sh and wheels; git ignores it
#   python -m benchmarks.gpu_loss --prepare .gpu_loss         shards of real text (26 MB); git ignores it too
# Then on the GPU machine checks, figures, and loss with .gpu_loss beside .gpu_kit. What was installed once stays.
# What comes out lies in $OUT (./gpu_out without it), at most eight files a command: a log of all that was printed, and
#   figures: gpu.json and <part>.jsonl; loss: gpu_loss.json, gpu_loss.svg, *.kernels.txt.
# Commit the two .json as benchmarks/results/<date>_gpu.json and <date>_gpu_loss.json.
#
# Needs: Python 3.11 or newer, torch with CUDA, cuDNN 9, and what the kit's env.sh installs without a network (see its
# README.md). Besides these numpy, packaging, setuptools (torch imports it), pyyaml, xxhash and psutil: megatron-core's
# checkpoint writer hangs without psutil, so its absence stops this script. Used where they are there: pytest, pynvml.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
mode=${1:-checks}
out=${OUT:-$PWD/gpu_out}
kit=${GPU_KIT:-.gpu_kit}
export PYTHONUNBUFFERED=1
mkdir -p "$out"
exec > >(tee "$out/$mode.log") 2>&1
failed=0

# What a part has left behind, in sessions of their own, would be measured with the next one.
clear_device() {
  [ "$mode" = rehearse ] || pkill -KILL -f 'python3? .*-m (tests\.gpu|benchmarks\.gpu|launcher|training)' || true
}

# part SECONDS COMMAND ...: what fails or takes too long is told, and the next part goes on.
part() {
  local limit=$1 began=$SECONDS
  shift
  echo "== $*"
  timeout --kill-after=5 "$limit" "$@" || { echo "== FAILED ($?) after $((SECONDS - began)) s: $*"; failed=1; clear_device; }
  echo "== $((SECONDS - began)) s"
}

if [ "$mode" != rehearse ]; then
  [ -f "$kit/env.sh" ] || { echo "no GPU kit in $kit; set GPU_KIT to the folder with env.sh" >&2; exit 1; }
  . "$kit/env.sh"
fi
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
python3 -c 'import psutil, torch, yaml, xxhash' || exit 1
[ "$mode" = rehearse ] || nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm,power.limit --format=csv || true

case $mode in
checks)
  part 100 python3 -W ignore "$kit/te_smoke.py"
  part 290 python3 -m tests.gpu.test_smoke
  if python3 -c 'import pytest' 2>/dev/null; then
    part 150 python3 -m pytest tests/gpu/test_health.py tests/gpu/test_rehearse.py -m gpu -rs -s -p no:cacheprovider
  else
    part 150 python3 -m tests.gpu.test_rehearse
  fi
  ;;
figures)
  touch "$out/.began"
  part 560 python3 -m benchmarks.gpu --minutes 8.5 --out "$out/parts"
  cp "$out"/parts/*.jsonl "$out" 2>/dev/null
  new=$(find benchmarks/results -name '*_gpu.json' -newer "$out/.began" | head -1)
  { [ -n "$new" ] && cp "$new" "$out/gpu.json"; } || failed=1
  rm -f "$out/.began"
  rm -rf "$out/parts"
  ;;
loss)
  part 400 python3 -m benchmarks.gpu_loss --data "${GPU_LOSS:-.gpu_loss}" --out "$out/runs" --minutes 6.3
  cp "$out"/runs/gpu_loss.* "$out"
  rm -rf "$out/runs"
  part 180 python3 -m benchmarks.gpu_ranks "$out"
  rm -rf "$out/runs"
  ;;
rehearse)
  part 600 python3 -m tests.gpu.test_smoke --cpu
  part 600 python3 -m benchmarks.gpu --rehearse --minutes 8 --out "$out/parts"
  part 600 python3 -m benchmarks.gpu_loss --data "${GPU_LOSS:-.gpu_loss}" --out "$out/runs" --cpu
  part 200 python3 -m benchmarks.gpu_ranks "$out" --rehearse
  rm -rf "$out/parts" "$out/runs"
  ;;
*)
  echo "what is '$mode'? checks, figures, loss or rehearse" >&2
  exit 1
  ;;
esac
exit $failed
