"""Longer sequences and other rotary positions: what is written, refused, trained and resumed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer

from cpt_merge.core.errors import UserError
from cpt_merge.merge import MergeConfig
from cpt_merge.merge.files import merge_directories
from cpt_merge.merge.plan import MergeInputs
from cpt_merge.tracking import Tracker
from cpt_merge.training.config import TrainingConfig
from cpt_merge.training.context import Context, RopeConfig
from cpt_merge.training.model.build import build_model, load_weights
from cpt_merge.training.phases import phases_of
from cpt_merge.training.saved import choose_steps, export_checkpoints
from tests.distributed import run_ranks
from tests.training.conftest import CONFIG
from tests.training.runs import Job, assert_same_weights, train

STEP = CONFIG["sequence_length"] * CONFIG["global_batch_size"]
YARN = {"type": "yarn", "factor": 4}
LONG = [
    {"train": "all", "tokens": 4 * STEP},
    {"train": "all", "sequence_length": 128, "rope": {**YARN, "theta": 50000}},
]
LLAMA = {"model_type": "llama", "max_position_embeddings": 2048}


def config(**changes: Any) -> TrainingConfig:
    return TrainingConfig(**{**CONFIG, **changes})


def extended(model: dict[str, Any], length: int, **rope: Any) -> dict[str, Any]:
    return Context(length, RopeConfig(**rope)).extend(model)


OF_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("model", "rope", "changed"),
    [
        (LLAMA, {"theta": 500000}, {"rope_theta": 500000, "max_position_embeddings": 8192}),
        # loaders multiply the positions of `linear` by its factor
        (LLAMA, {"type": "linear", "factor": 4},
         {"rope_scaling": {"rope_type": "linear", "factor": 4}}),
        (LLAMA, {"type": "yarn", "factor": 8},
         {"max_position_embeddings": 16384, "rope_scaling": {
             "rope_type": "yarn", "factor": 8, "original_max_position_embeddings": 2048}}),
        (LLAMA, {"type": "llama3", "factor": 8, "theta": 7e5},
         {"max_position_embeddings": 8192, "rope_theta": 7e5, "rope_scaling": {
             "rope_type": "llama3", "factor": 8, "original_max_position_embeddings": 2048,
             **OF_LLAMA3}}),
        ({**LLAMA, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
         {"type": "yarn", "factor": 4},
         {"max_position_embeddings": 8192, "rope_parameters": {
             "rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 2048,
             "rope_theta": 1e4}}),
        # a stretch that the model has gives way to a larger one, from the same original positions
        ({**LLAMA, "max_position_embeddings": 4096, "rope_scaling": {
            "type": "yarn", "factor": 2.0, "beta_fast": 16,
            "original_max_position_embeddings": 2048}},
         {"type": "yarn", "factor": 4},
         {"max_position_embeddings": 8192, "rope_scaling": {
             "rope_type": "yarn", "factor": 4, "beta_fast": 16,
             "original_max_position_embeddings": 2048}}),
        ({**LLAMA, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}, {"theta": 9e5},
         {"rope_theta": 9e5}),
    ],
)  # fmt: skip
def test_what_is_written(
    model: dict[str, Any], rope: dict[str, Any], changed: dict[str, Any]
) -> None:
    found = extended(model, 8192, **rope)
    assert found == {**model, **changed}
    assert extended(found, 8192, **rope) == found, "it can be written again"
    assert Context(8192).extend(model) == model


def test_only_the_layers_of_gemma_3_without_a_window_are_stretched() -> None:
    gemma = CONFIG_MAPPING["gemma3"]().to_dict()
    found = extended(gemma, 262144, type="linear", factor=8)
    text, before = found["text_config"], gemma["text_config"]
    assert text["rope_parameters"] == {
        "sliding_attention": before["rope_parameters"]["sliding_attention"],
        "full_attention": {
            **before["rope_parameters"]["full_attention"], "rope_type": "linear", "factor": 8
        },
    }  # fmt: skip
    assert {**found, "text_config": before} == gemma


@pytest.mark.parametrize(
    ("rope", "sentence"),
    [
        ({}, "changes nothing"),
        ({"type": "yarn"}, "belong together"),
        ({"factor": 2.0}, "belong together"),
        ({"type": "yarn", "factor": 1.0}, "greater than 1"),
        ({"type": "dynamic", "factor": 2.0}, "'linear', 'yarn' or 'llama3'"),
    ],
)
def test_rope_that_says_too_little_or_too_much(rope: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        RopeConfig(**rope)


@pytest.mark.parametrize(
    ("model", "rope", "sentence"),
    [
        ({"model_type": "gpt2", "n_positions": 1024}, {"theta": 1e6}, "family gpt2; leave it out"),
        ({**LLAMA, "model_type": "made_up"}, {"theta": 1e6}, "made_up"),
        ({**LLAMA, "rope_scaling": {"rope_type": "llama3", "factor": 8.0, **OF_LLAMA3}},
         YARN, "are of the type llama3 already"),
        ({**LLAMA, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}, {"theta": 9e5},
         "has 4096 positions; lower it, or raise the factor"),
        ({"model_type": "llama"}, YARN, "has no max_position_embeddings"),
        (LLAMA, {"type": "yarn", "factor": 2}, "= 8192 but the model has 4096 positions; lower it, or raise the factor"),
        (LLAMA, None, "= 8192 but the model has 2048 positions; lower it, or extend them with"),
    ],
)  # fmt: skip
def test_models_that_cannot_be_extended_like_this(
    model: dict[str, Any], rope: dict[str, Any] | None, sentence: str
) -> None:
    phase = {"train": "all", "sequence_length": 8192, "rope": rope}
    with pytest.raises(UserError, match=sentence):
        config(sequence_length=1024, phases=[phase]).check_positions(model)


def test_a_step_keeps_its_tokens_and_later_phases_the_context() -> None:
    found = config(phases=[*LONG[:1], {**LONG[1], "tokens": 4 * STEP}, {"train": "vocabulary"}])
    assert [context.length for context in found.contexts] == [32, 128, 128]
    assert [context.rope is None for context in found.contexts] == [True, False, False]
    within = found.within(found.contexts[1])
    assert (within.sequence_length, within.global_batch_size, within.micro_batch_size) == (
        128,
        2,
        1,
    )
    assert (within.steps, within.tokens_per_step) == (found.steps, found.tokens_per_step)
    assert found.longest == within
    with pytest.raises(ValidationError, match="no whole number of sequences of 100"):
        config(phases=[{"train": "all", "sequence_length": 100}])
    with pytest.raises(
        UserError, match=r"2 of them, .* over 4 GPUs; set training.global_batch_size = 16"
    ):
        found.check_processes(4, kind="GPUs")


def test_another_context_is_another_phase_and_no_other_mixture() -> None:
    mixture = {"train": "all", "weights": {"ko": 2}}
    longer = {**mixture, "sequence_length": 64}
    assert len(phases_of(config(phases=[*LONG[:1], mixture]))) == 1
    assert len(phases_of(config(phases=[*LONG[:1], longer]))) == 2


def test_runs_without_it_keep_their_keys() -> None:
    found = config(phases=[*LONG[:1], {"train": "all"}]).identity()
    assert "rope" not in found
    assert not {"rope", "sequence_length"} & found["phases"][0].keys()
    assert config(phases=LONG).identity()["phases"][1]["sequence_length"] == 128


def job(model: Path, store: Path, out: Path, **changes: Any) -> Job:
    return Job(model, store, out, {"phases": LONG, "evaluate_every": 12, **changes})


@pytest.fixture(scope="module")
def trained(model: Path, store: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A run whose second phase reads sequences that are four times as long, on two ranks."""
    out = tmp_path_factory.mktemp("context")
    base = limited(model, out / "model", 32)
    done = job(base, store, out / "run", checkpoints={"every": 4, "keep": 9})
    done.hook = MergeInputs(
        base, base, chat_of(base, out / "chat"), base, extend=done.config.extend
    )
    run_ranks(train, 2, done)
    return done


def limited(model: Path, out: Path, positions: int) -> Path:
    """The model with so many positions, also in its tokenizer."""
    out.mkdir()
    for path in model.iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    for name, key in (
        ("config.json", "max_position_embeddings"), ("tokenizer_config.json", "model_max_length")
    ):  # fmt: skip
        values = json.loads((model / name).read_text())
        (out / name).write_text(json.dumps({**values, key: positions}))
    return out


def chat_of(base: Path, out: Path) -> Path:
    loaded = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.add_(0.01)
    loaded.save_pretrained(out)
    AutoTokenizer.from_pretrained(base).save_pretrained(out)
    return out


@pytest.mark.slow
def test_the_trained_model_is_what_transformers_loads(trained: Job) -> None:
    """It gives the logits of our own model, which has the same rotary positions."""
    loaded = AutoModelForCausalLM.from_pretrained(trained.out / "cpt")
    rope = loaded.config.rope_parameters
    assert (rope["rope_type"], rope["factor"], rope["rope_theta"]) == ("yarn", 4, 50000)
    assert loaded.config.max_position_embeddings == 128
    assert AutoTokenizer.from_pretrained(trained.out / "cpt").model_max_length == 128
    last = trained.config.within(trained.config.contexts[-1])
    ours = build_model(trained.model, last.model_copy(update={"attention": "sdpa"}))
    load_weights(ours, trained.out / "cpt", torch.device("cpu"))
    ids = torch.arange(100)[None] % 90
    torch.testing.assert_close(ours.model(input_ids=ids).logits, loaded(input_ids=ids).logits)


@pytest.mark.slow
def test_hook_and_file_merge_are_the_same_bytes(trained: Job, tmp_path: Path) -> None:
    assert trained.hook
    inputs = MergeInputs(trained.out / "cpt", trained.hook.base, trained.hook.chat, trained.model)
    merge_directories(MergeConfig(), inputs, tmp_path / "merged", Tracker())
    for path in sorted((tmp_path / "merged").iterdir()):
        if path.name not in ("merge_report.json", "README.md"):
            assert path.read_bytes() == (trained.out / "merged" / path.name).read_bytes(), path.name
    limit = json.loads((tmp_path / "merged" / "tokenizer_config.json").read_text())
    assert limit["model_max_length"] == 128


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["fsdp2", "zero3"])
def test_a_stop_in_the_long_phase_changes_nothing(
    backend: str, model: Path, store: Path, tmp_path: Path
) -> None:
    whole, stopped = (job(model, store, tmp_path / name) for name in ("whole", "stopped"))
    whole.backend = stopped.backend = backend
    expected = run_ranks(train, 2, whole)[0]
    stopped.stop_after = 6
    run_ranks(train, 2, stopped)
    stopped.stop_after = 0
    resumed = run_ranks(train, 2, stopped)[0]
    assert 4 < min(resumed) < 12
    assert resumed == {step: expected[step] for step in range(min(resumed), 13)}
    assert_same_weights(tmp_path / "whole", tmp_path / "stopped")


@pytest.mark.slow
def test_a_checkpoint_is_exported_in_the_context_of_its_phase(trained: Job, tmp_path: Path) -> None:
    for step, positions in ((4, 32), (8, 128)):
        checkpoints = choose_steps(trained.out / "checkpoints", step, None)
        export_checkpoints(
            trained.config, trained.model, trained.model, checkpoints, tmp_path / str(step)
        )
        found = json.loads((tmp_path / str(step) / "config.json").read_text())
        assert found["max_position_embeddings"] == positions
    checkpoints = choose_steps(trained.out / "checkpoints", None, "4..8")
    with pytest.raises(UserError, match="different rotary positions"):
        export_checkpoints(
            trained.config, trained.model, trained.model, checkpoints, tmp_path / "mean"
        )
