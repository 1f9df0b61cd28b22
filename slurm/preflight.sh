# shellcheck shell=bash disable=SC2154,SC2034
# Sourced by cpt_merge.sh. Is every node fit for the run? What is looked at, and what it says, is in docs/slurm.md.
# Bad nodes are left out as far as launch.spare_nodes allows; with more of them the job ends.

preflight() {
    [[ ${CPT_MERGE_PREFLIGHT:-yes} == yes ]] || return 0
    local bad node
    once preflight "$@" --begin || return
    for node in $nodes; do # one srun for all would end the tasks of all as soon as it cannot start one on a dead node
        "${run[@]}" --nodes=1 --ntasks=1 --nodelist="$node" "${cli[@]}" preflight "$@" &
    done
    bad=$(once preflight "$@" --judge --nodes "$(paste -sd, <<<"$nodes")") || return
    use_no_more "$bad"
    each "$tasks" "${cli[@]}" preflight "$@" --network &
    bad=$(once preflight "$@" --judge --network --nodes "$(paste -sd, <<<"$nodes")") || return
    use_no_more "$bad"
}

# Without these nodes (A,B), and without what still runs on them.
use_no_more() {
    if [[ -n $1 ]]; then
        nodes=$(grep -vxF "${1//,/$'\n'}" <<<"$nodes")
        leave_out=(--exclude="$1")
        # shellcheck disable=SC2046
        kill $(jobs -p) 2>/dev/null
    fi
    wait
    return 0
}
