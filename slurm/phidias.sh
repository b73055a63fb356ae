#!/usr/bin/env bash
# Any verb of phidias as a job on one node: export and eval, which `phidias submit` queues behind the last stage.
#
#   sbatch --mem=128G slurm/phidias.sh export phi4
#
# Exit codes are phidias's. Options of sbatch before the script win over those here.
#SBATCH --job-name=phidias
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
common="${PHIDIAS_CODE:-${SLURM_SUBMIT_DIR:-}}/slurm/common.sh"
[[ -f $common ]] || { echo "no $common: submit this with sbatch, from the root of the repository, or export PHIDIAS_CODE=<the root>" >&2; exit 2; }
source "$common"
exec "${phidias[@]}" "$@"
