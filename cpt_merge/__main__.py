"""`python -m cpt_merge COMMAND`: the same as `cpt-merge COMMAND`, also under accelerate, torchrun and srun."""

from cpt_merge.launcher.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
