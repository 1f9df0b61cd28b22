"""Do all nodes run the same code, packages and recipe?"""

from __future__ import annotations

import hashlib
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from cpt_merge.cluster.preflight.reports import NodeReport
from cpt_merge.core.artifact import stage_key
from cpt_merge.core.package import PACKAGE
from cpt_merge.launcher.doctor import requirements
from cpt_merge.launcher.recipe import Recipe


def check_software(report: NodeReport, recipe: Recipe, wait: float) -> None:
    """Report digests of the code and of the recipe with its overrides, and packages' versions."""
    digest = code_digest(PACKAGE)
    report.same["code"] = {"digest": digest}
    report.same["recipe"] = {"digest": stage_key("recipe", recipe.model_dump(mode="json"), {})}
    report.same["packages"] = _package_versions()
    report.facts.append(f"code {digest[:8]}")


def code_digest(package: Path) -> str:
    """16 hexadecimal digits that change with any name or byte of the package's Python files."""
    folders = [path for path in package.iterdir() if path.is_dir()]  # links, in a checkout
    files = [*package.glob("*.py"), *(path for folder in folders for path in folder.rglob("*.py"))]
    digest = hashlib.sha256()
    for path in sorted(files):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        digest.update(f"{path.relative_to(package)}\0{content}\n".encode())
    return digest.hexdigest()[:16]


def _package_versions() -> dict[str, str]:
    """The versions of Python and of all packages in pyproject.toml, optional ones included."""
    found = {"python": platform.python_version()}
    for name in sorted({requirement.name for requirement in requirements()}):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
