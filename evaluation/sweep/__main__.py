"""`python -m evaluation.sweep RECIPE`: one of the processes of a sweep."""

from launcher.cli import stage_main

if __name__ == "__main__":
    raise SystemExit(stage_main("sweep"))
