#!/usr/bin/env bash
# Trains the stages of a run on a cluster, one task a GPU.
#
#   sbatch --nodes=240 --ntasks-per-node=8 --gpus-per-node=8 --time=1-00 slurm/pretrain.sh run=phi4 stage=pretrain
#
# The first start checks and freezes the config; whatever comes after, a requeue or the same line again, goes on from the run
# directory and reads no YAML. Before the time limit, and where it is preempted, the ranks save and the job queues itself again:
# a long run passes through any number of jobs. `phidias submit run=phi4` computes the options and submits this script.
#
# Exit codes are phidias's: 0 done, 2 refused, 3 refused for state on disk, 11 to retry, 13 needs a person, 130 stopped. Options
# of sbatch before the script win over those here.
#SBATCH --job-name=phidias
#SBATCH --ntasks-per-node=8
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
set -euo pipefail
# The script itself is a copy in Slurm's spool by now. Paths on the command line are relative to where it was submitted.
cd "${SLURM_SUBMIT_DIR:?submit this with sbatch, from the root of the repository}"
if [[ -n ${PHIDIAS_PYTHON:-} ]]; then
  phidias=("$PHIDIAS_PYTHON" -P -m launcher) # of the one who submitted; -P: the folder it works in is not code
elif [[ -x .venv/bin/phidias ]]; then
  phidias=(.venv/bin/phidias)
else
  phidias=(phidias)
fi
if ! command -v "${phidias[0]}" >/dev/null; then
  echo "no ${phidias[0]} on $(hostname): run 'make setup' in $PWD, or submit from an environment that this node sees too" >&2
  exit 2
fi
# exec: Slurm's signals reach phidias, and its exit code is the job's.
exec "${phidias[@]}" job "$@"
