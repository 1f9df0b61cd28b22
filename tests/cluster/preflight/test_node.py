"""What a node finds out about itself: memory and software."""

from __future__ import annotations

from pathlib import Path

from cpt_merge.cluster.preflight.node import memory
from cpt_merge.cluster.preflight.software import code_digest


def test_memory_is_compared_with_what_the_job_was_given() -> None:
    meminfo = "MemTotal:  8000 kB\nMemFree:  100 kB\nMemAvailable:  1000 kB\n"
    assert memory(meminfo, {}) == (8000 * 1024, 1000 * 1024)
    assert memory(meminfo, {"SLURM_MEM_PER_NODE": "4"})[0] == 4 * 2**20
    assert memory(meminfo, {"SLURM_MEM_PER_NODE": "0"})[0] == 8000 * 1024, "0: all memory"


def test_the_digest_changes_with_every_name_and_byte_of_the_code(tmp_path: Path) -> None:
    package, linked = tmp_path / "cpt_merge", tmp_path / "core"
    (package / "training" / "model").mkdir(parents=True)
    linked.mkdir()
    (package / "core").symlink_to(linked)  # as in a checkout
    files = package / "__init__.py", linked / "a.py", package / "training" / "model" / "b.py"
    found = [code_digest(package)]
    for path in files:
        path.write_text("x = 1\n")
        found.append(code_digest(package))
        path.write_text("x = 2\n")
        found.append(code_digest(package))
    files[-1].rename(files[-1].with_name("c.py"))
    found.append(code_digest(package))
    assert len(set(found)) == len(found)
