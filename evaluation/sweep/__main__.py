"""`python -m cpt_merge.evaluation.sweep RECIPE`: one of the processes of a sweep."""

from cpt_merge.launcher.cli import stage_main

if __name__ == "__main__":
    raise SystemExit(stage_main("sweep"))
