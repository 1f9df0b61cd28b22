"""The files of an extended tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from cpt_merge.checkpoint.reader import read_json
from cpt_merge.core.artifact import write_json, write_text
from cpt_merge.tokenizer_ext.base import FAST_FILE, ROLES, SETTINGS_FILE, Base
from cpt_merge.tokenizer_ext.fast import add_tokens, extend_model, look_up_whole_words
from cpt_merge.tokenizer_ext.rows import Layout, map_rows

SPECIAL_TOKENS_FILE = "special_tokens_map.json"
TEMPLATE_FILE = "chat_template.jinja"

# What PreTrainedTokenizerFast must not read: tokenizer.json already says it, or it belongs to another class.
DROPPED_SETTINGS = {
    "add_bos_token", "add_eos_token", "add_prefix_space", "added_tokens_decoder", "auto_map", "backend", "is_local",
    "legacy", "name_or_path", "sp_model_kwargs", "tokenizer_file", "use_default_system_prompt", "vocab_size",
}  # fmt: skip


def write_tokenizer(base: Base, layout: Layout, out: Path) -> None:
    """Write the tokenizer's files and `vocabulary_map.json` into `out`."""
    content = extend_model(base.content, layout.pieces, base.family.settled())
    content = look_up_whole_words(add_tokens(content, layout.added))
    write_text(out / FAST_FILE, json.dumps(content, ensure_ascii=False, indent=1))
    base.family.write_model(content, layout.pieces, layout.rows, out)
    settings = extended_settings(base)
    write_json(out / SETTINGS_FILE, settings)
    write_json(out / SPECIAL_TOKENS_FILE, _special_tokens(base, settings))
    if (base.directory / TEMPLATE_FILE).is_file():
        shutil.copyfile(base.directory / TEMPLATE_FILE, out / TEMPLATE_FILE)
    map_rows(base, layout).save(out)


def extended_settings(base: Base) -> dict[str, Any]:
    """`tokenizer_config.json` such that transformers 4.57 and 5 read the tokenizer alike.

    `PreTrainedTokenizerFast` takes `tokenizer.json` as it is; the `LlamaTokenizer` of transformers 5 rebuilds it and
    loses one leading space. Cleaning up spaces, which 4.57 does unless told not to, would break the round trip.
    """
    kept = {name: value for name, value in base.settings.items() if name not in DROPPED_SETTINGS}
    return {
        "clean_up_tokenization_spaces": False,
        **kept,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def _special_tokens(base: Base, settings: dict[str, Any]) -> dict[str, Any]:
    path = base.directory / SPECIAL_TOKENS_FILE
    if path.is_file():
        return read_json(path)
    names = [*(f"{role}_token" for role in ROLES), "additional_special_tokens"]
    return {name: settings[name] for name in names if settings.get(name)}
