"""What makes weights a chat model: configuration, tokenizer, chat template, model card."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from cpt_merge.checkpoint import token_changes
from cpt_merge.checkpoint.loaded_tokenizer import loading
from cpt_merge.checkpoint.model_files import (
    CONFIG_FILE,
    GENERATION_FILE,
    copy_companions,
    copy_files,
    model_config,
)
from cpt_merge.checkpoint.positions import raise_limit
from cpt_merge.checkpoint.reader import read_json
from cpt_merge.checkpoint.tensor_kinds import OTHER_MODALITIES, kind_of
from cpt_merge.checkpoint.text_sections import resize_config, with_values
from cpt_merge.checkpoint.token_ids import has_tokenizer
from cpt_merge.checkpoint.tokenizer_files import TOKENIZER_FILES, write_templates
from cpt_merge.checkpoint.vocabulary_map import MAP_FILE
from cpt_merge.core.artifact import fingerprint, installed_versions, write_json, write_text
from cpt_merge.core.hub_repository import shown_name
from cpt_merge.core.progress import say
from cpt_merge.merge import merge_report
from cpt_merge.merge.card import model_card
from cpt_merge.merge.chat_format import SPECIAL_IDS
from cpt_merge.merge.norms import Statistics
from cpt_merge.merge.plan import MergePlan
from cpt_merge.merge.vectors import Extracted


def write_merged(
    plan: MergePlan, statistics: list[Statistics], directory: Path, digest: str, cpt: str = "cpt"
) -> dict[str, Any]:
    """Complete the chat model in `directory`; the results in short, merge_report.json has all.

    `digest` identifies the merge; `cpt` is the role of the plan's CPT directory in the report.
    """
    write_all_but_weights(plan, directory)
    differences = config_differences(plan)
    for difference in differences:
        say(f"merge: {difference}; the output has the value of cpt")
    inputs = {
        cpt if label == "cpt" else label: model.directory for label, model in plan.models().items()
    }
    origin = {
        "digest": digest,
        "inputs": {
            name: {"name": shown_name(path), "fingerprint": fingerprint(path)}
            for name, path in inputs.items()
        },
        "versions": installed_versions(),
        "config_differences": differences,
        "stop_ids": plan.format.stop_ids,
    }
    _add_known_norms(plan, statistics)
    results = merge_report.write(plan, statistics, origin, directory)
    write_text(directory / "README.md", model_card(plan, origin, results))
    return results


def write_all_but_weights(plan: MergePlan, directory: Path) -> None:
    """Write configuration, stop ids, tokenizer and chat template of the chat model."""
    config = model_config(plan.cpt, plan.layout())
    if plan.rows != plan.cpt_rows:
        config = resize_config(config, plan.rows)
    config = with_values(config, plan.format.special_ids[CONFIG_FILE])
    write_json(directory / CONFIG_FILE, config)
    write_json(directory / GENERATION_FILE, generation_config(plan))
    copy_companions(_companions_of(plan), directory)
    for sentence in write_tokenizer(plan, directory):
        say(f"merge: {sentence}")
    if not plan.format.template:
        chat = plan.chat.source.chat_directory
        say(f"merge: {chat} has no chat template, so the output has none")


def _companions_of(plan: MergePlan) -> list[Path]:
    """Where the settings of processors come from: CPT, else chat or base if there is a tower."""
    others = [plan.chat.source.chat_directory, plan.chat.source.base_directory]
    tower = any(kind_of(tensor.name) in OTHER_MODALITIES for tensor in plan.tensors)
    return [plan.cpt.directory, *(others if tower else [])]


def _add_known_norms(plan: MergePlan, statistics: list[Statistics]) -> None:
    """Take the base's norms from an extracted vector, whose own norms are reported as shares."""
    for vector, of_vector in zip(plan.vectors, statistics, strict=True):
        if isinstance(vector.source, Extracted) and vector.source.base is None:
            squares = vector.source.description["base_squares"]
            for name, sums in of_vector.items():
                of_vector[name] = replace(sums.scaled(), base=float(squares.get(name, 0.0)))


def generation_config(plan: MergePlan) -> dict[str, Any]:
    """How to sample, from the chat model (else from CPT), with all stop ids."""
    of_chat = plan.chat.source.chat_directory / GENERATION_FILE
    of_cpt = [directory / GENERATION_FILE for directory in plan.cpt.directories]
    settings: dict[str, Any] = next(
        (read_json(path) for path in (of_chat, *of_cpt) if path.is_file()), {}
    )
    if of_chat.is_file():  # its ids belong to another vocabulary
        others = sorted(name for name in settings.keys() & OTHER_IDS if settings[name] is not None)
        if others:
            say(
                f"merge: {', '.join(others)} of {of_chat} contain ids of the chat model's own "
                "vocabulary; left out"
            )
        ids = OTHER_IDS.union(SPECIAL_IDS)
        settings = {name: value for name, value in settings.items() if name not in ids}
    return {**settings, **plan.format.special_ids[GENERATION_FILE]}


def write_tokenizer(plan: MergePlan, directory: Path) -> list[str]:
    """The extended tokenizer with the chat model's template, special tokens, bos, eos and pad.

    Returns a sentence for whatever is left out.
    """
    copy_files([plan.tokenizer / name for name in TOKENIZER_FILES], directory)
    chat = plan.chat.source.chat_directory
    token_changes.apply(plan.changes, directory, chat)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (directory / name).is_file():
            config = {**read_json(directory / name), **plan.format.roles}
            if plan.format.template:
                config.pop("chat_template", None)  # it has its own file
            write_json(directory / name, config)
    write_templates(plan.format.templates, directory)
    before = plan.chat.source.configs
    raise_limit(directory, plan.cpt.config, before.get("base", before["chat"]))
    return token_changes.drop_unknown(directory) if has_tokenizer(directory) else []


@contextmanager
def loading_tokenizer(plan: MergePlan) -> Iterator[Callable[[], None]]:
    """Load the output's tokenizer with transformers while the block does something else.

    Yields a function that waits for it and raises `UserError` if a token has another id there. The
    tokenizer stage has loaded its own tokenizers in the same way, so one that the merge does not
    change is not loaded again.
    """
    if not plan.changes and (plan.tokenizer / MAP_FILE).is_file():
        yield lambda: None
        return
    with TemporaryDirectory() as folder:
        directory = Path(folder)
        write_json(directory / CONFIG_FILE, plan.cpt.config)
        write_tokenizer(plan, directory)
        if not has_tokenizer(directory):
            yield lambda: None
            return
        with loading(directory, plan.chat.source.chat_directory) as check:
            yield lambda: check.require_none(str(plan.tokenizer))


OTHER_IDS = {
    "suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "force_words_ids", "sequence_bias",
    "forced_bos_token_id", "forced_eos_token_id", "forced_decoder_ids", "decoder_start_token_id",
    "no_timestamps_token_id", "stop_token_ids",
}  # fmt: skip
"""Other fields of a generation_config.json that hold ids."""

EXPECTED_TO_DIFFER = {
    "_name_or_path", "architectures", "vocab_size", "torch_dtype", "dtype", "transformers_version",
    "use_cache", "bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings",
    "model_type", "_attn_implementation_autoset",
}  # fmt: skip
"""Fields of config.json that do not affect the computation, or that the merge sets or checks."""

SAID_BY_ABSENCE = {"rope_theta", "rope_scaling", "sliding_window"}
"""Fields whose absence matters. Others are compared among the configurations that have them."""


def config_differences(plan: MergePlan) -> list[str]:
    """`field is a in cpt, b in chat` for every field of config.json in which the models differ."""
    return differing_fields({"cpt": plan.cpt.config, **plan.chat.source.configs})


def differing_fields(stored: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The same of the configurations of any models."""
    configs = {label: _normal(config) for label, config in stored.items()}
    found = []
    for name in sorted(set().union(*configs.values()) - EXPECTED_TO_DIFFER):
        stated = {
            label: config
            for label, config in configs.items()
            if name in config or name in SAID_BY_ABSENCE
        }
        values = {label: config.get(name) for label, config in stated.items()}
        if len({str(value) for value in values.values()}) > 1:
            found.append(
                f"{name} is " + ", ".join(f"{value} in {label}" for label, value in values.items())
            )
    return found


def _normal(config: Mapping[str, Any]) -> dict[str, Any]:
    """With `rope_theta` and `rope_scaling`, for which transformers 5 writes `rope_parameters`."""
    flat = {**config, **config.get("text_config", {})}
    for name in [name for name, value in flat.items() if name.endswith("_config")]:
        nested = flat.pop(name)
        if name != "text_config" and isinstance(nested, dict):
            flat |= {
                f"{name}.{field}": value
                for field, value in nested.items()
                if field not in EXPECTED_TO_DIFFER
            }
    rope = dict(flat.pop("rope_parameters", None) or {})
    theta = rope.pop("rope_theta", flat.get("rope_theta"))
    if rope.get("rope_type") == "default":
        rope = {}
    scaling = rope or flat.get("rope_scaling")
    return {**flat, "rope_theta": theta, "rope_scaling": scaling}
