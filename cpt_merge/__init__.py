"""Turn an English base and chat pair and text in a new language into a chat model in that language.

The names below are for notebooks and scripts (docs/api.md). They are imported when they are first
used, so `import cpt_merge` is fast and needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cpt_merge.core.errors import Interrupted, UserError
    from cpt_merge.data.sources import Corpus
    from cpt_merge.evaluation.config import EvaluationConfig
    from cpt_merge.evaluation.run import evaluate
    from cpt_merge.launcher.api import (
        extend_tokenizer,
        load_recipe,
        merge_in_memory,
        merge_models,
        resize_embeddings,
        run_stage,
    )
    from cpt_merge.launcher.recipe import Recipe
    from cpt_merge.tokenizer_ext.verify.check_tokenizer import check_tokenizer

__version__ = "0.1.0"

__all__ = [
    "Corpus", "EvaluationConfig", "Interrupted", "Recipe", "UserError", "check_tokenizer",
    "evaluate", "extend_tokenizer", "load_recipe", "merge_in_memory", "merge_models",
    "resize_embeddings", "run_stage",
]  # fmt: skip

_MODULES = {
    "Corpus": "data.sources",
    "EvaluationConfig": "evaluation.config",
    "Interrupted": "core.errors",
    "Recipe": "launcher.recipe",
    "UserError": "core.errors",
    "check_tokenizer": "tokenizer_ext.verify.check_tokenizer",
    "evaluate": "evaluation.run",
}  # and launcher.api for all others


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'cpt_merge' has no attribute {name!r}")
    module = import_module(f"cpt_merge.{_MODULES.get(name, 'launcher.api')}")
    value = globals()[name] = getattr(module, name)
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
