# shellcheck shell=bash disable=SC2154
# Sourced by cpt_merge.sh, and by `cpt-merge submit` before it calls sbatch, with `scripts` set to this folder: reads
# the site's settings, from the file CPT_MERGE_SITE or from site.sh in this folder, where there is one.

site=${CPT_MERGE_SITE:-$scripts/site.sh}
if [[ -f $site ]]; then
    bash -n "$site" || { echo "$site is not a valid bash script, see above; fix it." >&2; exit 2; }
    trap 'echo "$site ended the shell that read it (code $?); fix it." >&2; exit 2' EXIT
    # shellcheck source=slurm/site.example.sh
    source "$site"
    trap - EXIT
elif [[ -n ${CPT_MERGE_SITE:-} ]]; then
    echo "CPT_MERGE_SITE = $site does not exist; correct it or leave it out." >&2
    exit 2
fi
