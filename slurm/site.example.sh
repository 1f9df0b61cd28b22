#!/usr/bin/env bash
# Copy to slurm/site.sh and keep what your site needs. The job sources it on its first node before anything else, and
# `cpt-merge submit` before it calls sbatch (before a plain sbatch, do so yourself, if you set SBATCH_...).

# What sbatch would otherwise be told on its command line:
# export SBATCH_PARTITION=gpu SBATCH_ACCOUNT=my-project SBATCH_EXCLUSIVE=1

# The Python that has cpt-merge's packages; .venv/bin/python if not set. Modules go before.
# module load cuda/12.8
# export CPT_MERGE_PYTHON=$HOME/cpt-merge/.venv/bin/python

# A container instead: apptainer as part of the Python, pyxis as options of srun.
# export CPT_MERGE_PYTHON="apptainer exec --nv --bind $PWD,/scratch /images/cpt-merge.sif python"
# export CPT_MERGE_SRUN="--container-image=/images/cpt-merge.sqsh --container-mounts=$PWD:$PWD,/scratch:/scratch --container-workdir=$PWD"

# The network between the nodes, where the default one is the slow one.
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0

# No look at every node before the work begins, where the site does that itself.
# export CPT_MERGE_PREFLIGHT=no

# Caches on a file system that compute nodes can write to.
# export HF_HOME=/scratch/$USER/huggingface
