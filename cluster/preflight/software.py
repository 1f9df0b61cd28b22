"""Do all nodes run the same code with the same packages on the same recipe?"""

from __future__ import annotations

import hashlib
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from cpt_merge.cluster.preflight.report import NodeReport
from cpt_merge.core.artifact import stage_key
from cpt_merge.core.package import PACKAGE
from cpt_merge.launcher.doctor import requirements
from cpt_merge.launcher.recipe import Recipe

PACKAGES = (
    "checkpoint", "cluster", "core", "data", "evaluation", "launcher", "merge", "report", "tokenizer_ext", "tracking",
    "training",
)  # fmt: skip


def check_software(report: NodeReport, recipe: Recipe, wait: float) -> None:
    """Digests of the project's sources and of the recipe with its overrides; versions of Python and the packages."""
    report.same["code"] = {"digest": code_digest(PACKAGE)}
    report.same["recipe"] = {"digest": stage_key("recipe", recipe.model_dump(mode="json"), {})}
    report.same["packages"] = package_versions()
    report.facts.append(f"code {report.same['code']['digest'][:8]}")


def code_digest(root: Path) -> str:
    """16 hexadecimal digits that change with any byte or name of the project's Python files under `root`."""
    digest = hashlib.sha256()
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            digest.update(
                f"{path.relative_to(root)}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode()
            )
    return digest.hexdigest()[:16]


def package_versions() -> dict[str, str]:
    """Versions of Python and of all that pyproject.toml names, also where it is optional."""
    found = {"python": platform.python_version()}
    for name in sorted({requirement.name for requirement in requirements()}):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
