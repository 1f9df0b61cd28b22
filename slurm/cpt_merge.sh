#!/usr/bin/env bash
# The whole pipeline in one job:
#
#     sbatch [-N nodes] [--ntasks-per-node=8 --gpus-per-node=8] slurm/cpt_merge.sh RECIPE [section.key=value ...]
#
# Call it from the repository's root. What your site needs (modules, a container, a network interface) goes into
# slurm/site.sh, which is sourced if it is there; slurm/site.example.sh shows what it can hold.
#SBATCH --job-name=cpt-merge
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --output=cpt-merge-%j.log
#SBATCH --open-mode=append
#SBATCH --signal=USR1@300
set -euo pipefail

[[ $# -gt 0 ]] || { echo "usage: sbatch slurm/cpt_merge.sh RECIPE [section.key=value ...]" >&2; exit 2; }
site=slurm/site.sh
# shellcheck source=slurm/site.example.sh
if [[ -f $site ]]; then source "$site"; fi
python=${CPT_MERGE_PYTHON:-.venv/bin/python}

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT

once() { srun --nodes=1 --ntasks=1 "$python" -m launcher.cli "$@"; }         # one process
all() { srun --kill-on-bad-exit=1 "$python" -m launcher.cli "$@"; }          # one task per GPU, on all nodes

once tokenizer "$@"
once embeddings "$@"
once data "$@"
all train "$@"
once merge "$@" # does nothing where the post-training hook has merged already
all evaluate "$@"
once report "$@"
