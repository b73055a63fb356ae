#!/usr/bin/env bash
# Raw text to shards on a cluster: every element of the array is a worker, and they share the tasks among themselves.
#
#   sbatch --array=0-63 slurm/data_prep.sh run=phi4 run.data_dir=/shared/data
#
# Elements may start late, end early or be killed: what has no receipt is taken by another, or by the next submission of the same
# line. `phidias data engine=slurm ...` submits it with the size that the config says.
#SBATCH --job-name=phidias-data
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
# The script itself is a copy in Slurm's spool by now.
cd "${SLURM_SUBMIT_DIR:?submit this with sbatch, from the root of the repository}"
phidias=phidias
if [[ -x .venv/bin/phidias ]]; then phidias=.venv/bin/phidias; fi
command -v "$phidias" >/dev/null || { echo "no phidias here: run 'make setup' in $PWD, or load the environment that has it" >&2; exit 2; }
# A word of the command line comes last and wins.
exec "$phidias" data "data.num_workers=${SLURM_CPUS_PER_TASK:-1}" "$@"
