"""A checkpoint with the tensors of another one that stores the same model in another arrangement.

Versions of transformers save experts one by one or together. Its own conversions lead from either
to the model in memory, so they also lead from one to the other. No weights are read for that.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import replace
from typing import Any

from cpt_merge.checkpoint.headers import TensorInfo
from cpt_merge.checkpoint.pieces import RearrangedInfo
from cpt_merge.checkpoint.reader import Checkpoint
from cpt_merge.core.errors import UserError
from cpt_merge.core.progress import counted, say_once


def arranged_like(checkpoint: Checkpoint, like: Checkpoint) -> Checkpoint:
    """The checkpoint with the tensors of `like`, as far as it holds their elements; says so.

    Nothing changes if one of the two has all tensors of the other, or if transformers does not know
    the architecture.
    """
    wanted = like.tensors.keys() - checkpoint.tensors.keys()
    others = checkpoint.tensors.keys() - like.tensors.keys()
    if not wanted or not others:
        return checkpoint
    made, used = _made_of(checkpoint, like, wanted)
    if not made:
        return checkpoint
    used &= others
    kept = {name: info for name, info in checkpoint.tensors.items() if name not in used}
    first = min(made)
    say_once(
        f"{checkpoint.directory}: {counted(len(made), 'tensor')} of {like.directory} ({first}, "
        f"...) are made of {counted(len(used), 'tensor')} here, as transformers does it"
    )
    return replace(checkpoint, tensors={**kept, **made}, unchanged_files=frozenset())


def _made_of(
    checkpoint: Checkpoint, like: Checkpoint, wanted: Set[str]
) -> tuple[dict[str, TensorInfo], set[str]]:
    """Tensors of `like` from those of the checkpoint, and the names of those they are made of."""
    model = _empty_model(like.config)
    if model is None:
        return {}, set()
    from cpt_merge.checkpoint.model_names import find_stored

    try:
        there, here = (
            find_stored(model, {n: i.shape for n, i in each.tensors.items()}, each.directory)
            for each in (like, checkpoint)
        )
        in_memory = here.seen_in(checkpoint).tensors
    except UserError:  # what transformers cannot convert either does not fit together
        return {}, set()
    whole: dict[str, TensorInfo] = {
        name: in_memory[here.names.get(name, name)] for name in (*here.names, *here.rearranged)
    }
    made: dict[str, TensorInfo] = {}
    used: set[str] = set()
    for name, stored in there.names.items():
        if stored in wanted and name in whole:
            made[stored] = whole[name]
            used |= here.stored_names([name])
    for group in {id(group): group for group in there.groups.values()}.values():
        if wanted & group.stored.keys() and all(
            name in whole and whole[name].shape == there.rearranged[name].shape
            for name in group.tensors
        ):
            for stored, pieces in group.stored.items():
                made[stored] = RearrangedInfo.of(stored, there.shapes[stored], pieces, whole)
            used |= here.stored_names(group.tensors)
    return made, used


def _empty_model(config: Mapping[str, Any]) -> Any:
    """The model of a config.json without memory for weights; None if transformers has none."""
    import torch

    from cpt_merge.checkpoint.text_models import auto_class, config_of

    try:
        known = config_of(config)
        with torch.device("meta"):
            return auto_class(known).from_config(known, trust_remote_code=False)
    except Exception:  # an unknown family, or values that its class refuses
        return None
