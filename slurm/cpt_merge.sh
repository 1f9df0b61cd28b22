#!/usr/bin/env bash
# The whole pipeline in one job. From the root of a checkout:
#
#     sbatch [-N nodes] [--gpus-per-node=8] slurm/cpt_merge.sh RECIPE [section.key=value ...]
#
# From any other directory, and with an installed package: `cpt-merge submit RECIPE`, which sets
#
#     CPT_MERGE_SLURM     the folder of these scripts (Slurm runs a copy of this one); ./slurm if not set
#     CPT_MERGE_PYTHON    the Python that has cpt-merge; .venv/bin/python if not set
#
# A job that is stopped (time limit, preemption, lost node, killed process) returns to the queue and continues
# where it stopped. Settings of your site belong into slurm/site.sh; see site.example.sh and docs/slurm.md.
#SBATCH --job-name=cpt-merge
#SBATCH --nodes=1
#SBATCH --output=cpt-merge-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=USR1@300

[[ $# -gt 0 ]] || { echo "usage: sbatch slurm/cpt_merge.sh RECIPE [section.key=value ...]" >&2; exit 2; }
scripts=${CPT_MERGE_SLURM:-$PWD/slurm}
[[ -f $scripts/preflight.sh ]] || {
    echo "$scripts/preflight.sh does not exist; call sbatch in the root of a checkout, or use cpt-merge submit." >&2
    exit 2
}

# A request to stop is meant for the processes: they save and end, and this shell waits for them. If the shell gets
# one too, Slurm is ending the job (requeue, preemption, scancel), perhaps before anything else can be reported.
# shellcheck disable=SC2329
on_term() {
    [[ -z ${CPT_MERGE_ATTEMPT:-} || -f $CPT_MERGE_ATTEMPT/stopped.json ]] ||
        echo '{"reason": "SIGTERM", "text": "stopped by SIGTERM."}' >"$CPT_MERGE_ATTEMPT/stopped.json"
}
trap on_term TERM
trap : USR1

# shellcheck source=slurm/read_site.sh
source "$scripts/read_site.sh"
set -euo pipefail

read -ra run <<<"srun --overlap ${CPT_MERGE_SRUN:-}"
read -ra cli <<<"${CPT_MERGE_PYTHON:-.venv/bin/python} -m cpt_merge"
nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST") # the nodes in use: the preflight may leave some out
leave_out=()                                           # srun's option for the others
cpus=$SLURM_CPUS_ON_NODE
tasks=${SLURM_NTASKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}} # of training, on each node
unset SLURM_NTASKS SLURM_NPROCS SLURM_NTASKS_PER_NODE SLURM_CPUS_PER_TASK # srun would use them as options
export COLUMNS=120 # of the tables in the log

# A port of this node that nobody uses; all processes meet there.
export MASTER_PORT=$((15000 + SLURM_JOB_ID % 15000))
while (: <"/dev/tcp/localhost/$MASTER_PORT") 2>/dev/null; do MASTER_PORT=$((MASTER_PORT + 1)); done

# Run a command in one process, on the first node.
once() { "${run[@]}" "${leave_out[@]}" --nodes=1 --ntasks=1 --cpus-per-task="$cpus" "${cli[@]}" "$@"; }

# Run a program in a number of processes on every node.
each() {
    local processes=$1 count share
    shift
    count=$(wc -w <<<"$nodes")
    share=$((cpus > processes ? cpus / processes : 1))
    "${run[@]}" "${leave_out[@]}" --nodes="$count" --ntasks=$((processes * count)) --ntasks-per-node="$processes" \
        --overcommit --cpus-per-task="$share" --export="ALL,OMP_NUM_THREADS=${OMP_NUM_THREADS:-$share}" "$@"
}

# Run a command in a number of processes on every node. Each writes its own log; the first one's is shown here too.
everywhere() {
    local processes=$1 log="$CPT_MERGE_ATTEMPT/$2-rank" code=0 first follower
    shift
    first=$log-0000-$(head -n 1 <<<"$nodes").log
    touch "$first" # tail looks for a missing file too rarely for a short stage
    tail --pid=$$ --follow=name --sleep-interval=0.3 --lines=+1 "$first" 2>/dev/null &
    follower=$!
    each "$processes" --kill-on-bad-exit=1 --open-mode=append --output="$log-%4t-%N.log" "${cli[@]}" "$@" \
        2> >(tee -a "$CPT_MERGE_ATTEMPT/srun.log" >&2) || code=$?
    sleep 1 # for the last lines of the log
    kill $follower 2>/dev/null || true
    return $code
}

# Run the steps, lines of "SPREAD COMMAND", as long as they succeed.
pipeline() {
    local step spread command
    preflight "$@" || return
    for step in "${steps[@]}"; do
        read -r spread command <<<"$step"
        case $spread in
            once) once "$command" "$@" ;;
            nodes) everywhere 1 "$command" "$@" ;;
            tasks) everywhere "$tasks" "$command" "$@" ;;
        esac || return
    done
}
# shellcheck source=slurm/preflight.sh
source "$scripts/preflight.sh"

# The job's state: RUNNING, unless it was cancelled or is back in the queue; empty if Slurm does not answer.
state() { squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T 2>/dev/null || true; }

# Return to the queue, where jobs may.
requeue() {
    scontrol requeue "$SLURM_JOB_ID" || echo "job $SLURM_JOB_ID may not requeue itself; submit it again" >&2
    exit 75
}

# Exit if Slurm is ending the job by itself.
exit_if_ended() {
    case $(state) in RUNNING | "") return ;; esac # a controller that does not answer has not ended the job
    echo "job $SLURM_JOB_ID was cancelled or put back into the queue; what is saved is kept" >&2
    exit 75
}

# End after a call that must not fail. A signal that came just then is a request to stop like any other.
end_with() {
    exit_if_ended
    case $1 in
        75 | 138 | 143) requeue ;;
        2) exit 2 ;;
        *)
            echo "the job's first command failed (code $1, see above); are CPT_MERGE_PYTHON (${cli[*]:0:1}) and" \
                "CPT_MERGE_SRUN (${CPT_MERGE_SRUN:-not set}) right? slurm/site.sh sets them." >&2
            exit 2
            ;;
    esac
}

answer=$(once job begin "$@") || end_with $? # the attempt's folder, then a step on each line
mapfile -t steps <<<"$answer"
export CPT_MERGE_ATTEMPT=${steps[0]} CPT_MERGE_BATCH=$SLURMD_NODENAME:$$
unset "steps[0]"
code=0
pipeline "$@" || code=$?
((code == 0)) || exit_if_ended
verdict=$(once job end "$@" --attempt "$CPT_MERGE_ATTEMPT" --code "$code") || end_with $?
case $verdict in
    finished) exit 0 ;;
    requeue)
        exit_if_ended
        requeue
        ;;
    *) exit 2 ;;
esac
