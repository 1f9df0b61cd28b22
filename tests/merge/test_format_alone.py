"""CPT with the chat model's format and nothing of its vector, which fine-tuning starts from."""

from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from cpt_merge.checkpoint.tokenizer_files import TokenizerFiles
from cpt_merge.core.artifact import fingerprint
from cpt_merge.merge.config import MergeConfig, format_alone
from cpt_merge.merge.files import merge_directories
from cpt_merge.merge.plan import MergeInputs
from cpt_merge.tracking import Tracker
from tests.merge.conftest import Family, Weights

FORMAT = ("<|eot|>", "<|im_start|>")
BY_TOKEN = ("model.embed_tokens.weight", "lm_head.weight")


def made(config: MergeConfig, inputs: MergeInputs, out: Path) -> Weights:
    merge_directories(config, inputs, out, Tracker())
    return load_file(out / "model.safetensors")


@pytest.fixture
def inputs(untied: Family) -> MergeInputs:
    return MergeInputs(untied.cpt, untied.base, untied.chat, untied.tokenizer)


def test_only_the_rows_of_the_format_change(
    untied: Family, inputs: MergeInputs, tmp_path: Path
) -> None:
    formatted = made(format_alone(MergeConfig(ratio=0.7)), inputs, tmp_path / "formatted")
    ids = TokenizerFiles.read(tmp_path / "formatted").ids
    of_chat = TokenizerFiles.read(untied.chat).ids
    for name, tensor in untied.weights["cpt"].items():
        kept = [row for row in range(len(tensor)) if row not in {ids[token] for token in FORMAT}]
        rows = kept if name in BY_TOKEN else slice(None)
        assert formatted[name][rows].equal(tensor[rows].to(formatted[name].dtype)), name
    for name in BY_TOKEN:
        for token in FORMAT:
            chat = untied.weights["chat"][name][of_chat[token]]
            assert formatted[name][ids[token]].equal(chat.to(formatted[name].dtype))


def test_it_warns_of_nothing_that_a_vector_would_be_warned_of(
    inputs: MergeInputs, tmp_path: Path
) -> None:
    results = merge_directories(format_alone(MergeConfig()), inputs, tmp_path / "out", Tracker())
    assert results["warnings"] == []
    assert "`merged = cpt + 0 * (chat - base)`" in (tmp_path / "out" / "README.md").read_text()


def test_its_tokenizer_is_that_of_the_merged_model(inputs: MergeInputs, tmp_path: Path) -> None:
    made(format_alone(MergeConfig()), inputs, tmp_path / "formatted")
    made(MergeConfig(), inputs, tmp_path / "merged")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert fingerprint(tmp_path / "formatted" / name) == fingerprint(tmp_path / "merged" / name)


def test_a_model_that_trained_the_format_keeps_its_rows(
    untied: Family, inputs: MergeInputs, tmp_path: Path
) -> None:
    """The vector is added everywhere else as it is to CPT."""
    start = tmp_path / "formatted"
    formatted = made(format_alone(MergeConfig()), inputs, start)
    rows = [TokenizerFiles.read(start).ids[token] for token in FORMAT]
    for name in BY_TOKEN:
        formatted[name][rows] += 1
    save_file(formatted, start / "model.safetensors", {"format": "pt"})
    tuned = replace(inputs, cpt=start, tokenizer=None, has_format=True)
    merged, expected = (
        made(MergeConfig(), of, tmp_path / name)
        for of, name in ((tuned, "tuned_merged"), (inputs, "merged"))
    )
    for name in BY_TOKEN:
        expected[name][rows] = formatted[name][rows]
    assert merged.keys() == expected.keys()
    for name in expected:
        assert merged[name].equal(expected[name]), name
