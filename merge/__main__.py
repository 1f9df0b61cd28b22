"""`python -m cpt_merge.merge RECIPE`: this stage alone."""

from cpt_merge.launcher.cli import stage_main

if __name__ == "__main__":
    raise SystemExit(stage_main("merge"))
