"""Command lines of other tools that merge: mergekit and the scripts of the Chat Vector paper.

Each function writes what the tool reads (mergekit: `OUT.yml` next to `OUT`) and returns the
commands, for the timing and the comparison of results; nothing runs here. mergekit is in its own
virtual environment (`venv`), the scripts' dependencies too. Both want an `out` that isn't there
yet: mergekit leaves an old file in it as it was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

TUNED = ("--quiet", "--async-write", "--write-threads", "2", "--out-shard-size", "500M")
"""mergekit's flags with the least time and memory (500M are bytes); it ignores --write-threads."""

_OFFLINE = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


@dataclass(frozen=True)
class Peer:
    """Commands to run in order, variables to add to the environment, and the result's directory."""

    name: str
    commands: list[list[str]]
    out: Path
    environment: Mapping[str, str] = field(default_factory=lambda: dict(_OFFLINE))


@dataclass(frozen=True)
class PeerVector:
    """A model whose difference from the base mergekit adds, with a weight and a density."""

    model: Path
    weight: float = 1.0
    density: float = 1.0


def mergekit_task_arithmetic(
    venv: Path,
    cpt: Path,
    base: Path,
    chat: Path,
    ratio: float,
    out: Path,
    tokenizer: Path | None = None,
    flags: Sequence[str] = (),
) -> Peer:
    """base + 1 (cpt - base) + ratio (chat - base) in float32, as in issue 248 but for the dtype.

    For a longer vocabulary of `cpt` name it as `tokenizer` too. The config is the base model's.
    """
    config = _of_vectors(
        "task_arithmetic", base, [PeerVector(cpt), PeerVector(chat, ratio)], {}, tokenizer
    )
    for model in config["models"]:
        del model["parameters"]["density"]
    name = "mergekit task_arithmetic float32" + (", tuned" if flags == TUNED else "")
    return _mergekit(name, venv, config, out, flags)


def mergekit_linear(
    venv: Path,
    cpt: Path,
    base: Path,
    chat: Path,
    ratio: float,
    out: Path,
    tokenizer: Path | None = None,
) -> Peer:
    """1 cpt + ratio chat - ratio base: bfloat16 tensors, summed in float32.

    mergekit's best accurate recipe.

    For a longer vocabulary of `cpt` name it as `tokenizer` too.
    """
    config: dict[str, Any] = {
        "merge_method": "linear",
        "base_model": str(
            cpt
        ),  # the config's and the tokenizer's donor; it is weighted as any other
        "models": [
            {"model": str(model), "parameters": {"weight": weight}}
            for model, weight in ((cpt, 1.0), (chat, ratio), (base, -ratio))
        ],
        "parameters": {"normalize": False},
        "dtype": "bfloat16",
    }
    return _mergekit("mergekit linear, tuned", venv, _with_tokenizer(config, tokenizer), out, TUNED)


def mergekit_ties(
    venv: Path,
    base: Path,
    vectors: Sequence[PeerVector],
    out: Path,
    scale: float = 1.0,
    normalize: bool = True,
    tokenizer: Path | None = None,
) -> Peer:
    """base + scale TIES(each vector's model - base), in float32. `scale` is mergekit's `lambda`.

    Every vector is measured from `base`, which also takes the sum: mergekit can't add TIES of
    vectors from one model to another model. For a merged chat model give the CPT model as a vector
    of density 1.
    """
    parameters = {"normalize": normalize, "lambda": scale}
    config = _of_vectors("ties", base, vectors, parameters, tokenizer)
    return _mergekit("mergekit ties float32", venv, config, out, TUNED)


def mergekit_dare_linear(
    venv: Path,
    base: Path,
    vectors: Sequence[PeerVector],
    out: Path,
    scale: float = 1.0,
    rescale: bool = True,
    seed: int = 0,
    tokenizer: Path | None = None,
) -> Peer:
    """base + scale (sum of weight DARE(each vector's model - base)), in float32.

    `rescale` restores the sum of magnitudes tensor by tensor, which isn't the paper's division by
    the density.
    """
    config = _of_vectors(
        "dare_linear", base, vectors, {"rescale": rescale, "lambda": scale}, tokenizer
    )
    return _mergekit(
        "mergekit dare_linear float32", venv, config, out, (*TUNED, "--random-seed", str(seed))
    )


def chat_vector(
    venv: Path,
    scripts: Path,
    cpt: Path,
    pairs: Sequence[tuple[Path, Path]],
    ratios: Sequence[float],
    out: Path,
    skip_embed: bool = False,
) -> Peer:
    """The authors' scripts: extract the vector of each (base, chat) pair, add each with its ratio.

    The vectors are written next to `out` as `OUT.vector0` and so on, larger than the models.
    `skip_embed` is needed where `cpt` has more rows; it leaves both vocabulary matrices as they
    are.
    """
    if len(pairs) != len(ratios):
        raise ValueError(
            "The scripts leave out the vectors without a ratio silently: give each a ratio."
        )
    python = str(venv / "bin" / "python")
    vectors = [str(out.with_name(f"{out.name}.vector{number}")) for number in range(len(pairs))]
    commands = [
        [python, str(scripts / "extract_chat_vector.py"), str(base), str(chat), vector]
        for (base, chat), vector in zip(pairs, vectors, strict=True)
    ]
    add = [
        python,
        str(scripts / "add_chat_vector.py"),
        str(cpt),
        repr(vectors),
        str(out),
        "--ratio",
        repr([*ratios]),
    ]
    commands.append([*add, *(["--skip_embed", "True"] if skip_embed else [])])
    return Peer("Chat PeerVector scripts" + (", skip_embed" if skip_embed else ""), commands, out)


def _of_vectors(
    method: str,
    base: Path,
    vectors: Sequence[PeerVector],
    parameters: dict[str, Any],
    tokenizer: Path | None,
) -> dict[str, Any]:
    config: dict[str, Any] = {
        "merge_method": method,
        "base_model": str(base),
        "models": [
            {
                "model": str(vector.model),
                "parameters": {"weight": vector.weight, "density": vector.density},
            }
            for vector in vectors
        ],
        "dtype": "float32",
        "out_dtype": "bfloat16",
    }
    if parameters:
        config["parameters"] = parameters
    return _with_tokenizer(config, tokenizer)


def _with_tokenizer(config: dict[str, Any], tokenizer: Path | None) -> dict[str, Any]:
    return config if tokenizer is None else {**config, "tokenizer_source": str(tokenizer)}


def _mergekit(
    name: str, venv: Path, config: dict[str, Any], out: Path, flags: Sequence[str] = ()
) -> Peer:
    written = out.with_name(f"{out.name}.yml")
    written.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    longer = ", extended vocabulary" if "tokenizer_source" in config else ""
    command = [str(venv / "bin" / "mergekit-yaml"), str(written), str(out), *flags]
    return Peer(name + longer, [command], out)
