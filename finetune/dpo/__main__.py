"""`python -m cpt_merge.finetune.dpo RECIPE`, also under accelerate launch, torchrun and srun."""

from cpt_merge.launcher.cli import stage_main

if __name__ == "__main__":
    raise SystemExit(stage_main("dpo"))
