"""`python -m cpt_merge COMMAND` is `cpt-merge COMMAND`, also under accelerate and srun."""

from cpt_merge.launcher.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
