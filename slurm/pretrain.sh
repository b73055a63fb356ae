#!/usr/bin/env bash
# Trains the stages of a run on a cluster, one task a GPU.
#
#   sbatch --nodes=240 --ntasks-per-node=8 --gpus-per-node=8 --time=1-00 slurm/pretrain.sh run=phi4 stage=pretrain
#
# The first start checks and freezes the config, with a copy of the code; whatever comes after, a requeue or the same line again,
# goes on from the run directory. Before the time limit, and where it is preempted, the ranks save and the job queues itself
# again: a long run passes through any number of jobs. `phidias submit run=phi4` computes the options and submits this script.
#
# Exit codes are phidias's: 0 done, 2 refused, 3 refused for state on disk, 11 to retry, 13 needs a person, 130 stopped. Options
# of sbatch before the script win over those here.
#SBATCH --job-name=phidias
#SBATCH --ntasks-per-node=8
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
set -euo pipefail
trap '' USR1 # phidias listens from its first line on; until then nothing is to save
common="${PHIDIAS_CODE:-${SLURM_SUBMIT_DIR:-}}/slurm/common.sh"
[[ -f $common ]] || { echo "no $common: submit this with sbatch, from the root of the repository, or export PHIDIAS_CODE=<the root>" >&2; exit 2; }
source "$common"
# exec: Slurm's signals reach phidias, and its exit code is the job's.
exec "${phidias[@]}" job "$@"
