"""What each stage uses and leaves, for W&B's graph of artifacts.

An artifact has a name, an address and the digest by which the pipeline knows it. A stage that uses
the output of another one gives it the same name, so W&B takes both for the same version.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from cpt_merge.core.artifact import read_record
from cpt_merge.core.hub import model_directory, model_fingerprint
from cpt_merge.core.hub_repository import identity, shown_name
from cpt_merge.data.files import plain_path
from cpt_merge.data.sources import Source
from cpt_merge.launcher.run import Run
from cpt_merge.launcher.stage import Output, StageContext
from cpt_merge.tracking import Artifact

HUB = "https://huggingface.co"


def left(context: StageContext) -> list[Artifact]:
    """What a finished stage leaves."""
    output, run = context.stage.output, context.run
    return [_of_stage(run, output, f"stage:{context.key}", used=False)] if output else []


def used(context: StageContext) -> list[Artifact]:
    """What a stage is about to read, with the digests that `stage.json` will have."""
    run, found = context.run, list[Artifact]()
    for name, digest in context.inputs.items():
        made = context.stage.inputs.get(name)
        if made and made.output and digest.startswith("stage:"):
            found.append(_of_stage(run, made.output, digest, used=True))
        elif name in (named := _named_models(run)):
            label, model = named[name]
            label = label.rstrip("/").split("/")[-1]
            if identity(model):
                label = label.partition("@")[0]  # the digest has the commit
            uri = _model_address(model)
            found.append(Artifact(_name(f"{name}-{label}"), "model", uri, digest, True))
        elif name.startswith("model "):
            further = name.removeprefix("model ")
            path = run.further_models()[further].absolute()
            label = _name(f"model-{further}", str(path))
            found.append(Artifact(label, "model", _model_address(path), digest, True))
        elif name == "cpt":
            path = model_directory(run.recipe.sweep.cpt or "").absolute()
            label, uri = _name("cpt", str(path)), _model_address(path)
            found.append(Artifact(label, "model", uri, digest, True))
        elif name.startswith("text "):
            short = _digest(digest, 16)  # the digest joins those of all files
            path_of = name.removeprefix("text ")
            sources = [one for one in run.recipe.named_sources.values() if one.path == path_of]
            found += [
                Artifact(_text_name(one), "text", _address(one.path, digest), short, True)
                for one in sources
            ]
    return found


def notes_on_training(run: Run) -> tuple[str, ...]:
    """What the card of a merged model tells of how CPT came about, one sentence each.

    That is nothing if it was trained from the base in one go. Of an unfinished training, the newest
    checkpoint tells.
    """
    named, folder = run.recipe.training.start, run.folder("training")
    found = list[str]()
    if named:
        found.append(
            f"CPT started from {shown_name(run.start)} ({model_fingerprint(named)}), not from the "
            "base."
        )
    record = read_record(folder)
    if record:
        grown = record.results.get("grown", [])
    else:
        from cpt_merge.training.distributed.checkpoint import complete_checkpoints, read_saved_state
        from cpt_merge.training.growth import describe_growth

        newest = complete_checkpoints(folder / "checkpoints")[-1:]
        grown = describe_growth(read_saved_state(newest[0]).grown) if newest else []
    found += [f"CPT continued a shorter training: {text}." for text in grown]
    return tuple(found)


def _named_models(run: Run) -> dict[str, tuple[str, Path]]:
    """What the recipe calls the models that stages read, and their directories."""
    models, start = run.recipe.models, run.recipe.training.start
    found = {"base": (models.base, run.base), "chat": (models.chat, run.chat)}
    return found | ({"start": (start, run.start)} if start else {})


def _of_stage(run: Run, output: Output, digest: str, used: bool) -> Artifact:
    path: Path = getattr(run, output.attribute)
    name = _name(f"{run.recipe.name}-{output.attribute}")
    return Artifact(name, output.kind, path.absolute().as_uri(), digest, used)


def _text_name(source: Source) -> str:
    """Unique for each source: language, last part of the path that is not a pattern, digest."""
    parts = [part for part in Path(plain_path(source.path)).parts if not set(part) & set("*?[/~")]
    stem = parts[-1].split(".")[0] if parts else ""
    text = f"text-{source.language}" + (f"-{stem}" if stem != source.language else "")
    return _name(text, "\0".join([source.path, source.subset or "", source.split, source.field]))


def _model_address(directory: Path) -> str:
    """The commit's page, if the directory is in the hub's cache."""
    name, _, commit = (identity(directory) or "").partition("@")
    return f"{HUB}/{name}/tree/{commit}" if commit else directory.absolute().as_uri()


def _address(path: str, digest: str) -> str:
    """A commit of a dataset on the hub; else the file or a pattern's directory."""
    if digest.startswith("hub:"):
        name, _, commit = digest.removeprefix("hub:").partition("@")
        return f"{HUB}/datasets/{name}/tree/{commit}"
    whole = Path(path).expanduser().absolute()
    return next(one for one in (whole, *whole.parents) if one.exists()).as_uri()


def _name(text: str, identity: str = "") -> str:
    """A name that W&B accepts, with a digest of `identity` or of a text that had to be changed."""
    name = re.sub(r"[^\w.-]+", "-", text, flags=re.ASCII)[:120].strip("-")
    return f"{name}-{_digest(identity or text, 6)}" if identity or name != text else name


def _digest(text: str, digits: int) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:digits]
