#!/usr/bin/env bash
# Raw text to shards on a cluster: every element of the array is a worker, and they share the tasks among themselves.
#
#   sbatch --array=0-63 slurm/data_prep.sh run=phi4 run.data_dir=/shared/data
#
# Elements may start late, end early or be killed: what has no receipt is taken by another, or by the next submission of the same
# line. `phidias data engine=slurm ...` submits it with the size that the config says.
#
# Exit codes are phidias's: 0 whole, 2 refused or a source failed, 130 stopped. Options of sbatch before the script
# win over those here (--partition, --time, --mem, --output).
#SBATCH --job-name=phidias-data
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
common="${PHIDIAS_CODE:-${SLURM_SUBMIT_DIR:-}}/slurm/common.sh"
[[ -f $common ]] || { echo "no $common: submit this with sbatch, from the root of the repository, or export PHIDIAS_CODE=<the root>" >&2; exit 2; }
source "$common"
# As many workers as cores, before the first override: one of the command line comes later and wins, and Hydra wants overrides
# side by side, with no flag between them.
workers="data.num_workers=${SLURM_CPUS_PER_TASK:-1}"
words=()
for word in "$@"; do
  if [[ -n $workers && $word == *=* && $word != -* ]]; then
    words+=("$workers")
    workers=""
  fi
  words+=("$word")
done
# exec: signals reach phidias, and its exit code is the element's.
exec "${phidias[@]}" data ${words[@]+"${words[@]}"} ${workers:+"$workers"}
