#!/usr/bin/env bash
# The whole pipeline in one job, from the repository's root:
#
#     sbatch [-N nodes] [--gpus-per-node=8] slurm/cpt_merge.sh RECIPE [section.key=value ...]
#
# A job that is stopped (time limit, preemption, lost node, killed process) goes back into the queue and goes on from
# where it was. What your site needs goes into slurm/site.sh; see slurm/site.example.sh and docs/slurm.md.
#SBATCH --job-name=cpt-merge
#SBATCH --nodes=1
#SBATCH --output=cpt-merge-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=USR1@300

[[ $# -gt 0 ]] || { echo "usage: sbatch slurm/cpt_merge.sh RECIPE [section.key=value ...]" >&2; exit 2; }
site=slurm/site.sh
# shellcheck source=slurm/site.example.sh
if [[ -f $site ]]; then source "$site"; fi
set -euo pipefail

read -ra run <<<"srun ${CPT_MERGE_SRUN:-}"
read -ra cli <<<"${CPT_MERGE_PYTHON:-.venv/bin/python} -m launcher.cli"
cpus=$SLURM_CPUS_ON_NODE
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
tasks=${SLURM_NTASKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}} # of training, on each node
unset SLURM_NTASKS SLURM_NPROCS SLURM_NTASKS_PER_NODE SLURM_CPUS_PER_TASK # srun would take them for options of its own

export COLUMNS=120 # of the tables in the log

# A port that nobody on this node uses; all processes meet there.
export MASTER_PORT=$((15000 + SLURM_JOB_ID % 15000))
while (: <"/dev/tcp/localhost/$MASTER_PORT") 2>/dev/null; do MASTER_PORT=$((MASTER_PORT + 1)); done

# One process, on the first node.
once() { "${run[@]}" --nodes=1 --ntasks=1 --cpus-per-task="$cpus" "${cli[@]}" "$@"; }

# So many processes on every node. Each writes its own log; the first one's is shown here as well.
each() {
    local processes=$1 code=0
    shift
    tail --pid=$$ --retry --follow=name --lines=+1 "$CPT_MERGE_ATTEMPT/$1-rank-0000-$first.log" 2>/dev/null &
    local follower=$!
    "${run[@]}" --ntasks-per-node="$processes" --ntasks=$((processes * SLURM_JOB_NUM_NODES)) --overcommit \
        --cpus-per-task=$((cpus > processes ? cpus / processes : 1)) --kill-on-bad-exit=1 --open-mode=append \
        --output="$CPT_MERGE_ATTEMPT/$1-rank-%4t-%N.log" "${cli[@]}" "$@" \
        2> >(tee -a "$CPT_MERGE_ATTEMPT/srun.log" >&2) || code=$?
    sleep 1 # for the last lines of the log
    kill $follower
    return $code
}

pipeline() {
    once tokenizer "$@" &&
        once embeddings "$@" &&
        each 1 data "$@" &&
        each "$tasks" train "$@" &&
        each 1 merge "$@" && # has nothing left to do where the post-training hook has merged
        each "$tasks" evaluate "$@" &&
        once report "$@"
}

# A request to stop is for the processes: they save and end, and this shell waits for them.
trap : TERM USR1
CPT_MERGE_ATTEMPT=$(once job begin "$@")
export CPT_MERGE_ATTEMPT CPT_MERGE_BATCH=$SLURMD_NODENAME:$$
code=0
pipeline "$@" || code=$?
verdict=$(once job end "$@" --attempt "$CPT_MERGE_ATTEMPT" --code "$code")
case $verdict in
    finished) exit 0 ;;
    requeue)
        scontrol requeue "$SLURM_JOB_ID" || echo "job $SLURM_JOB_ID may not requeue itself; submit it again" >&2
        exit 75
        ;;
    *) exit 2 ;;
esac
