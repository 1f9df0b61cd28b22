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
[[ -d slurm ]] || { echo "$PWD is not the repository's root; call sbatch there." >&2; exit 2; }

# A request to stop is for the processes: they save and end, and this shell waits for them. One that this shell gets as
# well means that Slurm ends the job (requeue, preemption, scancel), and perhaps before another word can be said.
# shellcheck disable=SC2329
asked() {
    [[ -z ${CPT_MERGE_ATTEMPT:-} || -f $CPT_MERGE_ATTEMPT/stopped.json ]] ||
        echo '{"reason": "SIGTERM", "text": "stopped by SIGTERM."}' >"$CPT_MERGE_ATTEMPT/stopped.json"
}
trap asked TERM
trap : USR1

source slurm/read_site.sh
set -euo pipefail

read -ra run <<<"srun --overlap ${CPT_MERGE_SRUN:-}"
read -ra cli <<<"${CPT_MERGE_PYTHON:-.venv/bin/python} -m cpt_merge.launcher.cli"
nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST") # those that are used: preflight may leave some out
leave_out=()                                           # srun's option for the others
cpus=$SLURM_CPUS_ON_NODE
tasks=${SLURM_NTASKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}} # of training, on each node
unset SLURM_NTASKS SLURM_NPROCS SLURM_NTASKS_PER_NODE SLURM_CPUS_PER_TASK # srun would take them for options of its own
export COLUMNS=120 # of the tables in the log

# A port that nobody on this node uses; all processes meet there.
export MASTER_PORT=$((15000 + SLURM_JOB_ID % 15000))
while (: <"/dev/tcp/localhost/$MASTER_PORT") 2>/dev/null; do MASTER_PORT=$((MASTER_PORT + 1)); done

# One process, on the first node.
once() { "${run[@]}" "${leave_out[@]}" --nodes=1 --ntasks=1 --cpus-per-task="$cpus" "${cli[@]}" "$@"; }

# So many processes on every node.
each() {
    local processes=$1 count share
    shift
    count=$(wc -w <<<"$nodes")
    share=$((cpus > processes ? cpus / processes : 1))
    "${run[@]}" "${leave_out[@]}" --nodes="$count" --ntasks=$((processes * count)) --ntasks-per-node="$processes" \
        --overcommit --cpus-per-task="$share" --export="ALL,OMP_NUM_THREADS=${OMP_NUM_THREADS:-$share}" "$@"
}

# A command by so many processes on every node. Each writes its own log; the first one's is shown here as well.
stage() {
    local processes=$1 log="$CPT_MERGE_ATTEMPT/$2-rank" code=0 first follower
    shift
    first=$log-0000-$(head -n 1 <<<"$nodes").log
    touch "$first" # tail looks for a missing file too seldom for a short stage
    tail --pid=$$ --follow=name --sleep-interval=0.3 --lines=+1 "$first" 2>/dev/null &
    follower=$!
    each "$processes" --kill-on-bad-exit=1 --open-mode=append --output="$log-%4t-%N.log" "${cli[@]}" "$@" \
        2> >(tee -a "$CPT_MERGE_ATTEMPT/srun.log" >&2) || code=$?
    sleep 1 # for the last lines of the log
    kill $follower 2>/dev/null || true
    return $code
}

pipeline() {
    preflight "$@" &&
        once tokenizer "$@" &&
        once embeddings "$@" &&
        stage 1 data "$@" &&
        stage "$tasks" train "$@" &&
        stage 1 merge "$@" && # has nothing left to do where the post-training hook has merged
        stage "$tasks" evaluate "$@" &&
        once report "$@"
}
source slurm/preflight.sh

# Slurm's word for what becomes of the job: RUNNING, unless it was cancelled or is back in the queue; or no word.
state() { squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T 2>/dev/null || true; }

# Back into the queue, where jobs may go there.
requeue() {
    scontrol requeue "$SLURM_JOB_ID" || echo "job $SLURM_JOB_ID may not requeue itself; submit it again" >&2
    exit 75
}

# Nothing is left to do where Slurm is ending the job by itself.
end_if_ended() {
    case $(state) in RUNNING | "") return ;; esac # a controller that is silent just now has not ended the job
    echo "job $SLURM_JOB_ID was cancelled or put back into the queue; what is saved is kept" >&2
    exit 75
}

# After a call that must not fail. A signal that came just then is a request to stop like any other.
end_with() {
    end_if_ended
    case $1 in
        75 | 138 | 143) requeue ;;
        2) exit 2 ;;
        *)
            echo "the job could not speak (code $1, see above); are CPT_MERGE_PYTHON (${cli[*]:0:1}) and" \
                "CPT_MERGE_SRUN (${CPT_MERGE_SRUN:-not set}) right? slurm/site.sh sets them." >&2
            exit 2
            ;;
    esac
}

CPT_MERGE_ATTEMPT=$(once job begin "$@") || end_with $?
export CPT_MERGE_ATTEMPT CPT_MERGE_BATCH=$SLURMD_NODENAME:$$
code=0
pipeline "$@" || code=$?
((code == 0)) || end_if_ended
verdict=$(once job end "$@" --attempt "$CPT_MERGE_ATTEMPT" --code "$code") || end_with $?
case $verdict in
    finished) exit 0 ;;
    requeue)
        end_if_ended
        requeue
        ;;
    *) exit 2 ;;
esac
