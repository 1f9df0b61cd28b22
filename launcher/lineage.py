"""From text to chat model: what each stage uses and what it leaves, for W&B's graph of artifacts.

An artifact is a name, an address and the digest that the pipeline knows it by. A stage that uses what another left
names it alike, so that W&B takes both for the same version.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from launcher.stages import Run
from tracking.tracker import Artifact

# what a stage leaves: kind, and the path of the run that holds it
LEFT = {
    "tokenizer": ("tokenizer", "tokenizer"),
    "embeddings": ("model", "resized"),
    "data": ("store", "store"),
    "training": ("model", "cpt"),
    "merge": ("model", "merged"),
}
# by the names under which a stage lists its inputs, where these are stages
STAGE_OF = {
    "embeddings": {"tokenizer": "tokenizer"},
    "data": {"tokenizer": "tokenizer"},
    "training": {"model": "embeddings", "data": "data"},
    "merge": {"cpt": "training", "tokenizer": "tokenizer"},
    "evaluation": {"cpt": "training", "merged": "merge"},
}


def left(run: Run, stage: str, key: str) -> list[Artifact]:
    """What a finished stage leaves."""
    return [_of_stage(run, stage, f"stage:{key}", used=False)] if stage in LEFT else []


def used(run: Run, stage: str, inputs: dict[str, str]) -> list[Artifact]:
    """What a stage is about to read; `inputs`: its inputs' digests by name, as in `stage.json`."""
    found = []
    for name, digest in inputs.items():
        if name in STAGE_OF.get(stage, {}):
            found.append(_of_stage(run, STAGE_OF[stage][name], digest, used=True))
        elif name in ("base", "chat"):
            model = run.base if name == "base" else run.chat
            label = getattr(run.recipe.models, name).rstrip("/").split("/")[-1]
            found.append(Artifact(_name(f"{name}-{label}"), "model", model.absolute().as_uri(), digest, True))
        elif name.startswith("text "):
            path = name.removeprefix("text ")
            short = hashlib.sha256(digest.encode()).hexdigest()[:16]  # of a source's files, one digest each
            found.append(Artifact(_name(f"text-{Path(path).stem}"), "text", _address(path), short, True))
    return found


def _of_stage(run: Run, stage: str, digest: str, used: bool) -> Artifact:
    kind, attribute = LEFT[stage]
    path: Path = getattr(run, attribute)
    return Artifact(_name(f"{run.recipe.name}-{attribute}"), kind, path.absolute().as_uri(), digest, used)


def _address(path: str) -> str:
    """A local file or directory (of a pattern, the directory before it), or a dataset of the hub."""
    whole = Path(path).expanduser()
    fixed = next((one for one in (whole, *whole.parents) if one.exists()), None)
    if fixed is None or fixed == Path():
        return f"https://huggingface.co/datasets/{path}"
    return fixed.absolute().as_uri()


def _name(text: str) -> str:
    """Of the characters that W&B takes."""
    return re.sub(r"[^\w.-]+", "-", text, flags=re.ASCII)[:128]
