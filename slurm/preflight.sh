# shellcheck shell=bash disable=SC2154,SC2034
# Sourced by cpt_merge.sh: is every node fit for the run? docs/slurm.md lists what is checked. Bad nodes are left out
# as far as launch.spare_nodes allows; with more of them the job ends.

preflight() {
    [[ ${CPT_MERGE_PREFLIGHT:-yes} == yes ]] || return 0
    local bad node
    once preflight "$@" --begin || return
    for node in $nodes; do # one srun for all would end all tasks as soon as it cannot start one on a dead node
        "${run[@]}" --nodes=1 --ntasks=1 --nodelist="$node" "${cli[@]}" preflight "$@" &
    done
    bad=$(once preflight "$@" --judge --nodes "$(paste -sd, <<<"$nodes")") || return
    leave_out_nodes "$bad"
    each "$tasks" "${cli[@]}" preflight "$@" --network &
    bad=$(once preflight "$@" --judge --network --nodes "$(paste -sd, <<<"$nodes")") || return
    leave_out_nodes "$bad"
}

# Do without these nodes (A,B) from now on, and end what still runs on them.
leave_out_nodes() {
    if [[ -n $1 ]]; then
        nodes=$(grep -vxF "${1//,/$'\n'}" <<<"$nodes")
        leave_out=(--exclude="$1")
        # shellcheck disable=SC2046
        kill $(jobs -p) 2>/dev/null
    fi
    wait
    return 0
}
