"""What a recipe needs of the hub: `cpt-merge fetch` downloads it into the hub's cache on a login
node, and the checks before the first stage say what is missing there.
"""

from __future__ import annotations

from cpt_merge.checkpoint.adapters import ADAPTER_CONFIG, find_base, is_adapter
from cpt_merge.checkpoint.reader import read_json
from cpt_merge.core.errors import UserError
from cpt_merge.core.hub import download_model, is_complete, is_local, model_directory, needed_files
from cpt_merge.core.hub_repository import HubUnreachableError, Repository, Snapshot, cache_folder
from cpt_merge.core.progress import counted, say
from cpt_merge.data.hub_datasets import HubFile, TextFile, download_all, is_at_hand, size_of
from cpt_merge.data.sources import Source, is_on_hub, read_source, reads_all_files, source_files
from cpt_merge.launcher.recipe import Recipe


def hub_models(recipe: Recipe) -> dict[str, Repository]:
    """The models that are on the hub, by the recipe's key; each repository once."""
    named = recipe.named_models
    if recipe.sweep.cpt:
        named["sweep.cpt"] = recipe.sweep.cpt
    found: dict[str, Repository] = {}
    for key, name in named.items():
        if not is_local(name):
            repository = Repository.parse("model", name)
            if repository not in found.values():
                found[key] = repository
    return found


def hub_sources(recipe: Recipe) -> dict[str, Source]:
    """The sources that are on the hub, by the recipe's key."""
    return {key: source for key, source in recipe.named_sources.items() if is_on_hub(source)}


def check_cache(recipe: Recipe) -> None:
    """Raise `UserError` for what the hub does not have, and if the hub cannot be reached, for all
    that its cache lacks. Nothing is downloaded, nor asked if the cache is complete.
    """
    lacking = {
        f"{key} ({repository})": repository
        for key, repository in hub_models(recipe).items()
        if not is_complete(repository.cached())
    }
    for key, source in hub_sources(recipe).items():
        repository = Repository.parse("dataset", source.path)
        if repository.cached() is None or _missing(source):
            lacking[f"{key} ({repository})"] = repository
    for repository in lacking.values():
        try:
            repository.ask()
        except HubUnreachableError as error:
            raise UserError(
                f"the hub cannot be reached ({error.reason}), and its cache {cache_folder()} lacks "
                f"{', '.join(lacking)}; run `cpt-merge fetch RECIPE` where there is a network."
            ) from None


def _missing(source: Source) -> list[TextFile]:
    """The files of a source that the cache lacks. A source that may end early needs the first."""
    files = source_files(source)
    needed = files if reads_all_files(source) else files[:1]
    return [file for file in needed if not is_at_hand(file)]


def fetch(recipe: Recipe) -> None:
    """Download all that the recipe needs of the hub, and print commits and sizes.

    All repositories are looked up before the first large file is downloaded. Raises `UserError`.
    """
    for name in filter(is_local, recipe.named_models.values()):
        model_directory(name)  # raises for one that is missing
    models = [_look_up(repository) for repository in hub_models(recipe).values()]
    sources = list(hub_sources(recipe).values())
    for repository in dict.fromkeys(Repository.parse("dataset", one.path) for one in sources):
        _look_up(repository)
    for source in sources:
        source_files(source)
    for snapshot in models:
        _fetch_model(snapshot)
    _fetch_adapted(recipe)
    for source in sources:
        _fetch_text(source)
    if recipe.evaluation.lm_eval_tasks:
        from cpt_merge.evaluation.evaluators.knowledge import load_tasks

        load_tasks(recipe.evaluation)
    if models or sources:
        say(f"the hub's cache {cache_folder()} has all that the stages need; they need no network")
    else:
        say("the recipe needs nothing of the hub")


def _look_up(repository: Repository) -> Snapshot:
    """The newest commit; without a network the cached one, of which everything may be there."""
    repository.remove_leftovers()
    try:
        return repository.newest()
    except HubUnreachableError as error:
        cached = repository.cached()
        if cached is None:
            raise
        say(f"{repository}: the hub cannot be reached ({error.reason}); its cache has {cached}")
        return cached


def _fetch_model(snapshot: Snapshot) -> None:
    names = needed_files(snapshot.files)
    missing = len(snapshot.missing(names))
    download_model(snapshot)
    size = f"{counted(len(names), 'file')}, {_describe(snapshot.size(names))}"
    print(f"{snapshot.repository}: commit {snapshot.commit}, {size} ({missing} downloaded)")


def _fetch_text(source: Source) -> None:
    """Download the files of a source; if it may end early, those that are read."""
    files = [file for file in source_files(source) if isinstance(file, HubFile)]
    missing = sum(not is_at_hand(file) for file in files)
    if reads_all_files(source):
        download_all(files)
    else:
        for _ in read_source(source):
            pass
    here = [file for file in files if is_at_hand(file)]
    missing -= len(files) - len(here)
    part = "" if len(here) == len(files) else f" of {len(files):,}, as far as it is read"
    size = f"{counted(len(here), 'file')}{part}, {_describe(sum(map(size_of, here)))}"
    repository = Repository.parse("dataset", source.path)
    print(f"{repository}: commit {files[0].revision}, {size} ({missing} downloaded)")


def _fetch_adapted(recipe: Recipe) -> None:
    """Download the models that adapters belong to."""
    base = model_directory(recipe.models.base)
    for directory in filter(is_adapter, map(model_directory, recipe.named_models.values())):
        at_hand = None if directory == base else base
        find_base(directory, read_json(directory / ADAPTER_CONFIG), at_hand)


def _describe(size: int) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e9 else f"{size / 1e6:,.2f} MB"
