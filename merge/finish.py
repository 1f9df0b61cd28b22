"""All that makes weights a model: configuration, stop ids, tokenizer with the chat template, model card."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from checkpoint.dtypes import FLOATS, TORCH_NAMES
from checkpoint.reader import Checkpoint, read_json
from checkpoint.tokenizer import TOKENIZER_FILES, TokenizerFiles, read_stop_ids
from checkpoint.vocabulary import MAP_FILE
from checkpoint.writer import Layout
from core.artifact import fingerprint, installed_versions, write_json, write_text
from core.progress import say
from merge import report
from merge.plan import MergePlan
from merge.statistics import Statistics

CARRIED_ROLES = ("bos_token", "eos_token", "pad_token")
GENERATION_FILE = "generation_config.json"


def write_trained(source: Checkpoint, layout: Layout, tokenizer: Path, directory: Path) -> None:
    """Complete a checkpoint of trained weights: as `source`, with the extended tokenizer and its map."""
    write_json(directory / "config.json", model_config(source, layout))
    copy_files([source.directory / GENERATION_FILE], directory)
    copy_files([tokenizer / name for name in (*TOKENIZER_FILES, MAP_FILE)], directory)


def write_merged(plan: MergePlan, statistics: Statistics, directory: Path, cpt: str = "cpt") -> dict[str, Any]:
    """Complete the chat model in `directory` and return the results, which merge_report.json holds in full.

    `cpt` says what the plan's CPT directory is to the result.
    """
    stops = stop_ids(plan)
    write_json(directory / "config.json", {**model_config(plan.cpt, plan.layout()), **_ids(plan, "config.json", stops)})
    write_json(directory / GENERATION_FILE, generation_config(plan, stops))
    write_tokenizer(plan, directory)
    differences = config_differences({"cpt": plan.cpt, "base": plan.base, "chat": plan.chat})
    for difference in differences:
        say(f"merge: {difference}; the output has cpt's")
    inputs = {cpt: plan.cpt.directory, "base": plan.base.directory, "chat": plan.chat.directory}
    origin = {
        "inputs": {name: {"name": path.name, "fingerprint": fingerprint(path)} for name, path in inputs.items()},
        "versions": installed_versions(),
        "config_differences": differences,
        "stop_ids": stops,
    }
    results = report.write(plan, statistics, origin, directory)
    write_text(directory / "README.md", model_card(plan, origin, results))
    return results


def model_config(source: Checkpoint, layout: Layout) -> dict[str, Any]:
    """config.json of `source`, for tensors of the layout's types."""
    types = Counter(info.dtype for info in layout.tensors.values() if info.dtype in FLOATS)
    names = {stored: name for name, stored in TORCH_NAMES.items()}
    config = dict(source.config)
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = names[types.most_common(1)[0][0]]
    return config


def resize_config(config: dict[str, Any], rows: int) -> dict[str, Any]:
    """A config.json with another number of embedding rows, also where it lies in a `text_config`."""
    resized = {**config, "vocab_size": rows}
    if "vocab_size" in config.get("text_config", {}):
        resized["text_config"] = {**config["text_config"], "vocab_size": rows}
    return resized


def stop_ids(plan: MergePlan) -> list[int]:
    """Every id that ends a reply, in the output's vocabulary: chat's first, then base's."""
    chat = [*read_stop_ids(plan.chat.directory), *_role_ids(plan, "eos_token")]
    base = read_stop_ids(plan.base.directory)
    if plan.vocabularies is None:
        return list(dict.fromkeys([*chat, *base]))
    mapped = [*_mapped(chat, plan.vocabularies.chat, plan), *_mapped(base, plan.vocabularies.base, plan)]
    return list(dict.fromkeys(mapped))


def _role_ids(plan: MergePlan, role: str) -> list[int]:
    if plan.vocabularies is None or role not in plan.vocabularies.chat.roles:
        return []
    return [plan.vocabularies.chat.ids[plan.vocabularies.chat.roles[role]]]


def _mapped(ids: list[int], source: TokenizerFiles, plan: MergePlan) -> list[int]:
    """Ids of one tokenizer as ids of the output's, by token string; one that has no token is said and left out."""
    assert plan.vocabularies is not None
    for number in ids:
        if number not in source.tokens:
            say(f"merge: {source.directory} names the id {number}, which has no token; it is left out")
    return [plan.vocabularies.cpt.ids[source.tokens[number]] for number in ids if number in source.tokens]


def _ids(plan: MergePlan, file: str, stops: list[int]) -> dict[str, Any]:
    """The special ids of chat's configuration file, in the output's vocabulary."""
    path = plan.chat.directory / file
    config = read_json(path) if path.is_file() else {}
    values: dict[str, Any] = {}
    for name in ("bos_token_id", "pad_token_id"):
        if isinstance(config.get(name), int):
            ids = [config[name]]
            ids = ids if plan.vocabularies is None else _mapped(ids, plan.vocabularies.chat, plan)
            if ids:
                values[name] = ids[0]
    if stops:
        values["eos_token_id"] = stops if len(stops) > 1 else stops[0]
    return values


def generation_config(plan: MergePlan, stops: list[int]) -> dict[str, Any]:
    """How to sample, from the chat model (else from CPT), with all stop ids."""
    sources = [model.directory / GENERATION_FILE for model in (plan.chat, plan.cpt)]
    settings = next((read_json(path) for path in sources if path.is_file()), {})
    return {**settings, **_ids(plan, GENERATION_FILE, stops)}


def write_tokenizer(plan: MergePlan, directory: Path) -> None:
    """The extended tokenizer, with the chat model's template and its bos, eos and pad tokens."""
    copy_files([plan.tokenizer / name for name in TOKENIZER_FILES], directory)
    if plan.vocabularies is None:
        return
    chat = plan.vocabularies.chat
    roles = {role: token for role, token in chat.roles.items() if role in CARRIED_ROLES}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (directory / name).is_file():
            config = {**read_json(directory / name), **roles}
            if chat.chat_template:
                config.pop("chat_template", None)  # it has a file of its own
            write_json(directory / name, config)
    if chat.chat_template:
        write_text(directory / "chat_template.jinja", chat.chat_template)
    else:
        say(f"merge: {chat.directory} has no chat template, so the output has none of its")


def copy_files(paths: list[Path], directory: Path) -> None:
    """Copy those of the files that exist."""
    for path in paths:
        if path.is_file():
            shutil.copyfile(path, directory / path.name)


COMPARED_FIELDS = (
    "rope_theta", "rope_scaling", "max_position_embeddings", "sliding_window", "use_sliding_window", "layer_types",
    "rms_norm_eps", "hidden_act", "attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar",
)  # fmt: skip


def config_differences(models: Mapping[str, Checkpoint]) -> list[str]:
    """`field is a in cpt, b in chat` for every field of rope, context and activations in which the models differ."""
    configs = {label: _normal(model.config) for label, model in models.items()}
    found = []
    for name in COMPARED_FIELDS:
        values = {label: config.get(name) for label, config in configs.items()}
        if len({str(value) for value in values.values()}) > 1:
            found.append(f"{name} is " + ", ".join(f"{value} in {label}" for label, value in values.items()))
    return found


def _normal(config: Mapping[str, Any]) -> dict[str, Any]:
    """transformers 5 writes `rope_parameters`, earlier ones `rope_theta` and `rope_scaling`: the earlier form."""
    rope = dict(config.get("rope_parameters") or {})
    theta = rope.pop("rope_theta", config.get("rope_theta"))
    if rope.get("rope_type") == "default":
        rope = {}
    return {**config, "rope_theta": theta, "rope_scaling": rope or config.get("rope_scaling")}


def model_card(plan: MergePlan, origin: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    """README.md: what was merged, how, from what, and under which licences."""
    licences = {label: _front_matter(model.directory) for label, model in (("base", plan.base), ("chat", plan.chat))}
    named = {str(fields["license"]) for fields in licences.values() if "license" in fields}
    front: dict[str, Any] = {"library_name": "transformers", "tags": ["merge", "chat-vector"]}
    if named:
        front["license"] = named.pop() if len(named) == 1 else "other"
    lines = ["---", yaml.safe_dump(front, sort_keys=False).strip(), "---", "", "# Chat model by chat vector", ""]
    lines += [f"`merged = cpt + {plan.config.ratio:g} * (chat - base)`, made with cpt-merge.", ""]
    lines += ["| model | name | fingerprint | licence |", "|---|---|---|---|"]
    for label, entry in origin["inputs"].items():
        licence = ", ".join(f"{name}: {value}" for name, value in licences.get(label, {}).items()) or "not stated"
        lines.append(f"| {label} | {entry['name']} | {entry['fingerprint']} | {licence} |")
    lines += [
        "",
        "Rows of the vocabulary: " + ", ".join(f"{n} {role}" for role, n in results["rows"].items()) + ".",
        "",
    ]
    if plan.config.rules:
        lines += ["Rules: " + "; ".join(str(rule.model_dump(exclude_defaults=True)) for rule in plan.config.rules), ""]
    lines += ["Versions: " + ", ".join(f"{name} {version}" for name, version in origin["versions"].items()) + ".", ""]
    return "\n".join([*lines, "![Norms and cosines by layer](merge_norms.png)", ""])


def _front_matter(directory: Path) -> dict[str, Any]:
    """The licence fields at the head of a model's README.md."""
    path = directory / "README.md"
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    if not text.startswith("---\n") or "\n---" not in text[4:]:
        return {}
    try:
        fields = yaml.safe_load(text[4 : text.index("\n---", 4)])
    except yaml.YAMLError:
        return {}
    known = ("license", "license_name", "license_link")
    return {name: fields[name] for name in known if name in fields} if isinstance(fields, dict) else {}
