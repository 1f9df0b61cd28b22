"""`python -m tokenizer_ext RECIPE`: this stage alone."""

from launcher.cli import stage_main

if __name__ == "__main__":
    raise SystemExit(stage_main("tokenizer"))
