"""`python -m training RECIPE`, also under accelerate launch, torchrun and srun."""

from launcher.cli import stage_main

if __name__ == "__main__":
    raise SystemExit(stage_main("train"))
