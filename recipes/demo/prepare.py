"""Prepare the demo's inputs: `python -m cpt_merge.recipes.demo.prepare --out runs/demo-inputs`.

Writes OUT/base and OUT/chat (a small Llama pretrained on English and its chat sibling, Hugging Face
format), OUT/text (one document per line, one file per language), OUT/prompts.jsonl (requests that
no model has seen) and OUT/licences.txt. This is no part of the framework: a real run starts from
published models and its user's own text.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cpt_merge.core.errors import UserError
from cpt_merge.core.progress import say

MARKER = "complete.json"  # its digest says which code, settings and packages made the folder


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and prepare.

    Exit code 2 after one sentence when something is amiss.
    """
    parser = argparse.ArgumentParser(
        prog="python -m cpt_merge.recipes.demo.prepare", description="Prepare the demo's inputs."
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/demo-inputs"), help="folder to write"
    )
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count(), help="CPU threads that train the pair"
    )
    options = parser.parse_args(arguments)
    try:
        prepare(options.out, options.threads)
    except UserError as error:
        say(f"demo: {error}")
        return 2
    except OSError as error:
        say(
            f"demo: {error.filename or options.out}: {error.strerror}; free it or choose another "
            "--out."
        )
        return 2
    return 0


def prepare(out: Path, threads: int) -> None:
    """Make `out`, or say that it is there already. It appears complete or not at all."""
    check_packages()
    from cpt_merge.recipes.demo.pair import PairSettings

    settings = PairSettings()
    digest = digest_of(dataclasses.asdict(settings))
    if (out / MARKER).is_file() and json.loads((out / MARKER).read_text(encoding="utf-8")).get(
        "digest"
    ) == digest:
        say(f"demo: {out} is up to date")
        return
    if out.exists() and not (out / MARKER).is_file() and any(out.iterdir()):
        raise UserError(f"{out} exists and was not made by this command; choose another --out.")
    started = time.monotonic()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{out.name}.", dir=out.parent) as temporary:
        fresh = Path(temporary) / out.name
        fresh.mkdir()
        write_inputs(fresh, settings, threads)
        write_json(
            fresh / MARKER, {"digest": digest, "seconds": round(time.monotonic() - started, 1)}
        )
        if out.exists():
            shutil.rmtree(out)
        fresh.rename(out)
    say(f"demo: {out} is ready ({time.monotonic() - started:.0f} s)")


def check_packages() -> None:
    """Raise `UserError` if a package of the extra `demo` is missing."""
    try:
        import cpt_merge.recipes.demo.corpus as corpus

        corpus.licences()
    except ModuleNotFoundError as missing:  # importlib.metadata's PackageNotFoundError is one too
        raise UserError(
            f"the package {missing.name} is missing; install it with: pip install -e .[demo]"
        ) from None


def digest_of(settings: Mapping[str, Any]) -> str:
    """16 hexadecimal digits of this folder's code, the settings and the versions of what they
    depend on.
    """
    from cpt_merge.recipes.demo.corpus import licences

    state = hashlib.sha256()
    for path in sorted(
        path for path in Path(__file__).parent.iterdir() if path.suffix in (".py", ".yaml")
    ):
        state.update(path.name.encode() + path.read_bytes())
    state.update(json.dumps(settings, sort_keys=True).encode() + licences().encode())
    return state.hexdigest()[:16]


def write_inputs(out: Path, settings: Any, threads: int) -> None:
    """Write text, prompts, licences and the pair into the empty folder `out`."""
    from cpt_merge.recipes.demo.corpus import build_corpus, licences
    from cpt_merge.recipes.demo.pair import make_pair

    say("demo: text")
    corpus = build_corpus(settings.corpus)
    (out / "text").mkdir()
    for language, text in corpus.items():
        write_json_lines(
            out / "text" / f"{language}.jsonl", ({"text": document} for document in text.documents)
        )
    write_json_lines(
        out / "prompts.jsonl",
        (
            {"language": language, "messages": [{"role": "user", "content": prompt}]}
            for language, text in corpus.items()
            for prompt in text.prompts
        ),
    )
    (out / "licences.txt").write_text(licences(), encoding="utf-8")
    make_pair(corpus["en"], settings, threads, out)


def write_json_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """One JSON object per line, UTF-8."""
    path.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """An indented JSON object, UTF-8."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
