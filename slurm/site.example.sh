#!/usr/bin/env bash
# Copy this to slurm/site.sh, or to a file that CPT_MERGE_SITE names, and keep what your site needs. The job sources it
# on its first node before anything else; `cpt-merge submit` sources it before it calls sbatch. Before a plain sbatch,
# source it yourself if you set SBATCH_... in it.

# Options of sbatch
# export SBATCH_PARTITION=gpu SBATCH_ACCOUNT=my-project SBATCH_EXCLUSIVE=1

# The Python that has cpt-merge, after the modules that it needs. If not set: the Python of `cpt-merge submit`, or
# .venv/bin/python for a plain sbatch.
# module load cuda/12.8
# export CPT_MERGE_PYTHON=$HOME/cpt-merge/.venv/bin/python

# A container: apptainer is part of the Python, pyxis is a set of options of srun
# export CPT_MERGE_PYTHON="apptainer exec --nv --bind $PWD,/scratch /images/cpt-merge.sif python"
# export CPT_MERGE_SRUN="--container-image=/images/cpt-merge.sqsh --container-mounts=$PWD:$PWD,/scratch:/scratch --container-workdir=$PWD"

# The network between the nodes, if the default one is slow
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0

# No preflight, if the site checks its nodes itself
# export CPT_MERGE_PREFLIGHT=no

# Caches on a file system that compute nodes can write to
# export HF_HOME=/scratch/$USER/huggingface
