# shellcheck shell=bash
# Sourced by cpt_merge.sh, and by `cpt-merge submit` before sbatch: what slurm/site.sh sets, where there is one.

if [[ -f slurm/site.sh ]]; then
    bash -n slurm/site.sh || { echo "slurm/site.sh is no bash script, see above; mend it." >&2; exit 2; }
    trap 'echo "slurm/site.sh ended the shell that read it (code $?); mend it." >&2; exit 2' EXIT
    # shellcheck source=slurm/site.example.sh
    source slurm/site.sh
    trap - EXIT
fi
