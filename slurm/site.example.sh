#!/usr/bin/env bash
# Copy to slurm/site.sh and keep what your site needs. It is sourced on the first node, before anything else.

# module load cuda/12.8 gcc/13
# export CPT_MERGE_PYTHON=$HOME/cpt-merge/.venv/bin/python
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
# export HF_HOME=/scratch/$USER/hf
