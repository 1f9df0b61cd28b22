"""What the norms of a family compute in fp32, read in the source of transformers, without torch."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from functools import cache
from pathlib import Path

_CASTS = {"to", "type_as", "float"}


@cache
def multiply_in_fp32(model_type: str) -> bool:
    """Whether norms multiply by their weight in fp32 and cast the product.

    Most cast first: `weight * normalised.to(input_dtype)`. False for a family that is not there.
    """
    folder = _folder(model_type)
    files = sorted(folder.glob("modeling_*.py")) if folder else []
    trees = (ast.parse(file.read_text(encoding="utf-8")) for file in files)
    return any(_multiplies(forward) for tree in trees for forward in _norms(tree))


def _folder(model_type: str) -> Path | None:
    """The folder of a family; those of its parts (`gemma3n_text`) begin with the family's name."""
    spec = importlib.util.find_spec("transformers")
    roots = spec.submodule_search_locations or [] if spec else []
    parts = model_type.replace("-", "_").split("_")
    names = ["_".join(parts[:count]) for count in range(len(parts), 0, -1)]
    folders = (Path(root) / "models" / name for name in names for root in roots)
    return next((folder for folder in folders if folder.is_dir()), None)


def _norms(tree: ast.Module) -> Iterator[ast.FunctionDef]:
    """The forward functions of norms that have one input; gated ones have two."""
    for found in tree.body:
        if isinstance(found, ast.ClassDef) and "Norm" in found.name:
            methods = (one for one in found.body if isinstance(one, ast.FunctionDef))
            for method in methods:
                if method.name == "forward" and len(method.args.args) == 2:
                    yield method


def _multiplies(forward: ast.FunctionDef) -> bool:
    returned = [node.value for node in ast.walk(forward) if isinstance(node, ast.Return)]
    products = [
        side
        for node in ast.walk(forward)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult)
        for weight, side in ((node.left, node.right), (node.right, node.left))
        if _names_weight(weight)
    ]
    return any(map(_is_cast, returned)) and any(not _is_cast(side) for side in products)


def _names_weight(node: ast.AST) -> bool:
    return any(isinstance(one, ast.Attribute) and one.attr == "weight" for one in ast.walk(node))


def _is_cast(node: ast.AST | None) -> bool:
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in _CASTS
    )
