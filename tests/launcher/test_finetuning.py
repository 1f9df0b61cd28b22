"""Fine-tuning as part of a run: CPT + FT + vector, and CPT + vector + FT."""

import dataclasses
import json
import math
import random
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from cpt_merge.core.artifact import fingerprint, read_record
from cpt_merge.core.errors import UserError
from cpt_merge.data.store import MaskedCounts, Store
from cpt_merge.launcher.execute import run_stage
from cpt_merge.launcher.plan import show_plan
from cpt_merge.launcher.recipe import load_recipe
from cpt_merge.launcher.run import Run
from cpt_merge.launcher.stage import is_up_to_date
from cpt_merge.launcher.stages import find_stage, stages_of
from cpt_merge.merge.merge_report import made_in_memory
from cpt_merge.tracking import read_log
from tests.command_line import cpt_merge
from tests.launcher.conftest import adopt, sentences
from tests.processes import Processes

FINETUNE: dict[str, Any] = {
    "sequence_length": 128, "global_batch_size": 4, "learning_rate": 0.003, "epochs": 4,
    "evaluate_every": 4, "heldout": 0.1,
}  # fmt: skip


def write_conversations(folder: Path) -> list[dict[str, str]]:
    """Conversations of one or two turns in which every question has the same answer."""
    generator, sources = random.Random(0), []
    for language in ("ko", "zh_tw"):
        said = iter(sentences(language, 300))
        rows = []
        for _ in range(100):
            turns = [(next(said)[:12], "가나" if language == "ko" else "天地")]
            turns += [(next(said)[:12], turns[0][1])] * generator.randint(0, 1)
            messages = [
                {"role": role, "content": text}
                for turn in turns
                for role, text in zip(("user", "assistant"), turn, strict=True)
            ]
            rows.append(json.dumps({"messages": messages}, ensure_ascii=False))
        path = folder / f"chat-{language}.jsonl"
        path.write_text("\n".join(rows), encoding="utf-8")
        sources.append({"path": str(path), "language": language})
    return sources


def begin(finished: Path, recipe_path: Path, folder: Path, **keys: Any) -> Run:
    """A run whose CPT and merge are finished, and whose recipe has fine-tuning."""
    values = yaml.safe_load(recipe_path.read_text())
    values["finetune"] = {"sources": write_conversations(folder), **FINETUNE, **keys}
    values |= {"runs": str(folder / "runs"), "launch": {"processes": 1}}
    path = folder / "tuned.yaml"
    path.write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
    shutil.copytree(finished, folder / "runs" / "tiny")
    adopt(folder / "runs" / "tiny", str(finished.parent), str(folder / "runs"))
    return Run.load(path)


@pytest.fixture(scope="module")
def tuned(
    finished: Path, recipe_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Run]:
    run = begin(finished, recipe_path, tmp_path_factory.mktemp("tuned"))
    for stage in stages_of(run.recipe)[:-1]:
        run_stage(run, stage)
    return run


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_what_was_trained_before_is_not_trained_again(tuned: Run, finished: Path) -> None:
    for stage in ("training", "merge"):
        record = read_record(tuned.folder(stage))
        assert record
        assert record.key == read_record(finished / stage).key


def test_the_replies_are_learned(tuned: Run) -> None:
    rows = read_log(tuned.folder("finetune") / "log").rows
    for language in ("ko", "zh_tw"):
        losses = [row[f"valid/{language}/loss"] for row in rows if f"valid/{language}/loss" in row]
        assert losses[-1] < losses[0] / 4, losses
    assert not any("bits_per_byte" in name for row in rows for name in row)


def test_conversations_are_held_out_whole(tuned: Run) -> None:
    for source in Store.open(tuned.conversations).info.sources:
        for counts in (source.train, source.heldout):
            assert isinstance(counts, MaskedCounts)
            assert 0 < counts.trained < counts.tokens


def test_fine_tuning_starts_from_cpt_and_the_vector_is_added_to_its_result(tuned: Run) -> None:
    """This pair's chat format has no tokens of its own, so no row comes from the chat model."""
    cpt, formatted = weights(tuned.cpt), weights(tuned.formatted)
    assert all(cpt[name].equal(formatted[name]) for name in cpt)
    base, chat, result, merged = (
        weights(path) for path in (tuned.base, tuned.chat, tuned.tuned, tuned.tuned_merged)
    )
    name = "model.layers.0.mlp.up_proj.weight"
    assert not result[name].equal(cpt[name])
    # the hook starts from the fp32 masters, which the export has rounded
    expected = result[name].float() + (chat[name].float() - base[name].float())
    torch.testing.assert_close(merged[name].float(), expected, atol=2e-3, rtol=0)


def test_cards_say_what_was_trained_on_what(tuned: Run) -> None:
    card = (tuned.tuned / "README.md").read_text()
    assert f"steps from model ({fingerprint(tuned.formatted)})" in card
    assert "| ko:chat-ko | ko |" in card
    assert "### Chat model by chat vector" in card  # of the model that it started from
    merged = (tuned.tuned_merged / "README.md").read_text()
    assert "cpt here is CPT after fine-tuning on conversations" in merged


def test_the_hook_leaves_the_merge_finished(tuned: Run) -> None:
    assert is_up_to_date(tuned, find_stage(tuned.recipe, "finetune_merge"))
    report = json.loads((tuned.tuned_merged / "merge_report.json").read_text())
    assert made_in_memory(tuned.tuned_merged)
    assert report["inputs"]["chat"]["fingerprint"] == fingerprint(tuned.chat)


def test_other_epochs_repeat_the_fine_tuning_alone(tuned: Run) -> None:
    changed = Run.load(Path(tuned.words[0]), ["finetune.epochs=1"])
    states = {stage.name: is_up_to_date(changed, stage) for stage in stages_of(changed.recipe)}
    assert [name for name, done in states.items() if not done] == [
        "finetune", "finetune_merge", "evaluation",
    ]  # fmt: skip


@pytest.mark.slow
def test_all_models_are_evaluated(tuned: Run) -> None:
    run_stage(tuned, stages_of(tuned.recipe)[-1])
    results = json.loads((tuned.folder("evaluation") / "results.json").read_text())
    assert list(results["models"]) == ["base", "chat", "cpt", "merged", "tuned", "tuned_merged"]
    done = cpt_merge("run", tuned.words[0])
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("finished already") == 10
    assert "all 10 stages are finished" in (tuned.recipe.directory / "report.html").read_text()


@pytest.mark.slow
def test_the_merged_model_is_fine_tuned(finished: Path, recipe_path: Path, tmp_path: Path) -> None:
    run = begin(finished, recipe_path, tmp_path, after="merge")
    done = cpt_merge("run", run.words[0], "launch.processes=2")
    assert done.returncode == 0, done.stderr
    assert not run.tuned_merged.exists()
    assert not run.formatted.exists()
    results = json.loads((run.folder("evaluation") / "results.json").read_text())
    assert list(results["models"]) == ["base", "chat", "cpt", "merged", "tuned"]
    record = read_record(run.folder("finetune"))
    assert record
    assert record.inputs["model"] == f"stage:{read_record(run.folder('merge')).key}"


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"sequence_length": 300}, r"finetune.sequence_length = 300 but the model has 256"),
        ({"global_batch_size": 3}, r"finetune.global_batch_size = 3 does not divide over 2"),
        ({"lora": {"targets": ["nowhere"]}}, r"finetune.lora.targets: nowhere names no linear"),
    ],
)
def test_what_fine_tuning_would_refuse_is_refused_before_the_first_stage(
    recipe_path: Path, tmp_path: Path, keys: dict[str, Any], sentence: str
) -> None:
    values = yaml.safe_load(recipe_path.read_text())
    values["finetune"] = {"sources": write_conversations(tmp_path), **FINETUNE, **keys}
    values["runs"] = str(tmp_path / "runs")
    path = tmp_path / "tuned.yaml"
    path.write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
    with pytest.raises(UserError, match=sentence):
        show_plan(load_recipe(path, ["launch.processes=2"]))
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_after_context_extension_conversations_may_be_longer(
    finished: Path, recipe_path: Path, tmp_path: Path
) -> None:
    """The tokenizer of what is fine-tuned knows it, too."""
    run = begin(finished, recipe_path, tmp_path, sequence_length=512, global_batch_size=1)
    tokens = run.recipe.training.tokens
    step = run.recipe.training.tokens_per_step
    long = f"{{train: all, sequence_length: {step // 2}, rope: {{type: yarn, factor: 4}}}}"
    words = [
        f"training.phases=[{{train: all, tokens: {tokens}}}, {long}]",
        f"training.tokens={tokens + 2 * step}", "evaluation.max_prompts=1", "finetune.epochs=1",
    ]  # fmt: skip
    done = cpt_merge("run", run.words[0], *words)
    assert done.returncode == 0, done.stderr
    for folder in (run.cpt, run.merged, run.tuned, run.tuned_merged):
        assert json.loads((folder / "config.json").read_text())["max_position_embeddings"] == 1024
        limit = json.loads((folder / "tokenizer_config.json").read_text()).get("model_max_length")
        assert limit is None or limit >= 1024


@pytest.mark.slow
def test_a_bad_conversation_is_refused_before_the_first_stage(
    recipe_path: Path, tmp_path: Path
) -> None:
    values = yaml.safe_load(recipe_path.read_text())
    sources = write_conversations(tmp_path)
    asked = {"messages": [{"role": "user", "content": "天"}]}
    path = Path(sources[1]["path"])
    path.write_text(json.dumps(asked) + "\n" + path.read_text())
    values |= {"finetune": {"sources": sources, **FINETUNE}, "runs": str(tmp_path / "runs")}
    recipe = tmp_path / "tuned.yaml"
    recipe.write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
    done = cpt_merge("plan", str(recipe))
    assert done.returncode == 2, done.stderr
    assert f"{path}: line 1 has no message of an assistant to train on; fix it" in done.stderr
    assert not (tmp_path / "runs").exists()


def finetuned(run: Run, folder: Path, *settings: str) -> Run:
    """The run copied to `folder` and fine-tuned there with these settings, by the command line."""
    words = [run.words[0], f"runs={folder}", "tracking.mode=disabled", *settings]
    shutil.copytree(
        run.recipe.directory, folder / "tiny", ignore=shutil.ignore_patterns("finetune*")
    )
    adopt(folder / "tiny", str(run.recipe.directory.parent), str(folder))
    done = cpt_merge("finetune", *words)
    assert done.returncode == 0, done.stderr
    return Run.load(Path(words[0]), words[1:])


def last_losses(run: Run) -> list[float]:
    log = read_log(run.folder("finetune") / "log")
    return [log.series(f"valid/{language}/loss")[-1][1] for language in ("ko", "zh_tw")]


@pytest.mark.slow
@pytest.mark.parametrize("lora", [[], ["finetune.lora={rank: 4}"]])
@pytest.mark.parametrize("backend", ["fsdp2", "zero2", "zero3"])
def test_every_backend_learns_the_same(
    tuned: Run, tmp_path: Path, backend: str, lora: list[str]
) -> None:
    alone = finetuned(tuned, tmp_path / "alone", *lora)
    several = ["launch.processes=2", f"launch.accelerate_config={backend}", *lora]
    divided = finetuned(tuned, tmp_path / "divided", *several)
    assert last_losses(divided) == pytest.approx(last_losses(alone), abs=1e-3)
    assert made_in_memory(divided.tuned_merged)


@pytest.mark.slow
def test_a_killed_fine_tuning_ends_in_the_same_bytes(
    tuned: Run, tmp_path: Path, processes: Processes
) -> None:
    settings = ["launch.processes=2", "training.checkpoints.every=3"]
    expected = finetuned(tuned, tmp_path / "whole", *settings)
    shutil.copytree(
        tuned.recipe.directory, tmp_path / "tiny", ignore=shutil.ignore_patterns("finetune*")
    )
    adopt(tmp_path / "tiny", str(tuned.recipe.directory.parent), str(tmp_path))
    words = [tuned.words[0], f"runs={tmp_path}", "tracking.mode=disabled", *settings]
    killed = processes.python("-m", "cpt_merge.launcher.cli", "finetune", *words)
    folder = tmp_path / "tiny" / "finetune"
    killed.wait_until(lambda: any(folder.glob("checkpoints/step-*6/*.json")), "a checkpoint")
    killed.signal(signal.SIGKILL)
    killed.finish()
    assert not (folder / "stage.json").exists()
    again = cpt_merge("finetune", *words)
    assert again.returncode == 0, again.stderr
    assert "continues from step" in again.stderr
    found = Run.load(Path(words[0]), words[1:])
    for made, wanted in (
        (found.tuned, expected.tuned),
        (found.tuned_merged, expected.tuned_merged),
    ):
        for path in wanted.glob("*.safetensors"):
            assert fingerprint(made / path.name) == fingerprint(path)


def write_pairs(folder: Path) -> dict[str, str]:
    """Pairs of two replies to each question, of which the shorter one is preferred."""
    said = iter(sentences("ko", 200))
    rows = [
        {"prompt": next(said)[:12], "chosen": "가나", "rejected": next(said)[:20]}
        for _ in range(100)
    ]
    path = folder / "pairs.jsonl"
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines), encoding="utf-8")
    return {"path": str(path), "language": "ko"}


@pytest.mark.slow
def test_replies_are_compared_at_the_end(finished: Path, recipe_path: Path, tmp_path: Path) -> None:
    values = yaml.safe_load(recipe_path.read_text())
    values["dpo"] = {**FINETUNE, "sources": [write_pairs(tmp_path)], "epochs": 2}
    values |= {"runs": str(tmp_path / "runs"), "launch": {"processes": 2}}
    path = tmp_path / "dpo.yaml"
    path.write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
    shutil.copytree(finished, tmp_path / "runs" / "tiny")
    adopt(tmp_path / "runs" / "tiny", str(finished.parent), str(tmp_path / "runs"))
    done = cpt_merge("run", path)
    assert done.returncode == 0, done.stderr
    run = Run.load(path)
    log = read_log(run.folder("dpo") / "log")
    losses = [loss for _, loss in log.series("valid/ko/loss")]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses[-1] < 0.3
    assert log.newest["train/preferred"] == 1.0
    assert log.newest["train/margin"] > 1.0
    results = json.loads((run.folder("evaluation") / "results.json").read_text())
    assert list(results["models"]) == ["base", "chat", "cpt", "merged", "aligned"]
    record = read_record(run.folder("dpo"))
    merged = read_record(run.folder("merge"))
    assert record
    assert merged
    assert record.inputs["model"] == f"stage:{merged.key}"


def test_too_few_conversations_for_a_batch_are_refused_before_the_training(tuned: Run) -> None:
    from cpt_merge.launcher.heavy_checks import _check_conversations

    section = tuned.recipe.finetune
    assert section
    larger = section.model_copy(update={"global_batch_size": 10_000})
    run = dataclasses.replace(tuned, recipe=tuned.recipe.model_copy(update={"finetune": larger}))
    with pytest.raises(UserError, match=r"than finetune.global_batch_size = 10000; lower"):
        _check_conversations(run, here=True)


def test_a_small_part_of_an_epoch_is_one_step(tuned: Run) -> None:
    section = tuned.recipe.finetune
    assert section
    few = section.model_copy(update={"epochs": 1e-12})
    tokens, _ = few.reading(Store.open(tuned.conversations).info.sources)
    assert few.training_config(tuned.recipe.training, tokens).steps == 1
