"""`cpt-merge compare`: which models of which runs are put side by side, and what is left out."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from cpt_merge.core.errors import UserError
from cpt_merge.evaluation.config import EvaluationConfig
from cpt_merge.evaluation.conversation import Conversation, Turn
from cpt_merge.evaluation.evaluators.dialogue import DialogueEvaluator
from cpt_merge.evaluation.evaluators.evaluator import Findings, Measurement, Metric
from cpt_merge.evaluation.evaluators.form import FormEvaluator
from cpt_merge.evaluation.evaluators.language import LanguageEvaluator
from cpt_merge.evaluation.measured import FILE, Measured, MeasuredModel
from cpt_merge.evaluation.results import ModelResult, Results
from cpt_merge.launcher.cli import main
from cpt_merge.launcher.compare_runs import compare

BITS = Metric("bits_per_byte", "bits/byte", "bits", rising=False, share=False)
CHAT = Metric("chat", "chat", "good replies")
PREFERRED = Metric("judge_preferred", "preferred", "wins")


def model(name: str, good: int, weights: str, wins: int | None = None) -> MeasuredModel:
    """A model whose first `good` of 20 replies are good."""
    chat = {unit: (float(unit < good), 1.0) for unit in range(20)}
    bits = dict.fromkeys(range(3), (10.0 + good, 10.0))
    findings = [
        Findings([Measurement(BITS, "ko", bits)]), Findings([Measurement(CHAT, "ko", chat)])
    ]  # fmt: skip
    if wins is not None:
        won = {unit: (float(unit < wins), 1.0) for unit in range(20)}
        findings.append(Findings([Measurement(PREFERRED, "ko", won)]))
    return MeasuredModel(f"models/{name}", weights, ModelResult(name, findings, [], 0.0))


def evaluated(folder: Path, *models: MeasuredModel, **asked: str) -> Path:
    """The folder of a run whose evaluation has finished."""
    metrics = {"language": [BITS], "form": [CHAT, PREFERRED]}
    settings = EvaluationConfig().model_dump(mode="json")
    asked = {"language": "texts", "form": "prompts", **asked}
    out = folder / "evaluation"
    out.mkdir(parents=True)
    Measured(settings, asked, metrics, "base", list(models)).write(out)
    return folder


def compared(out: Path) -> dict[str, dict[str, float]]:
    """The values of each row, by metric."""
    models = json.loads((out / "evaluation" / "results.json").read_text())["models"]
    return {
        name: {metric: one["value"] for metric, one in of_model["scores"]["ko"].items()}
        for name, of_model in models.items()
    }


BASE = model("base", 0, "1")


def test_every_model_has_one_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = evaluated(tmp_path / "one", BASE, model("cpt", 5, "2"), model("merged", 20, "3"))
    two = evaluated(tmp_path / "two", BASE, model("cpt", 5, "2"), model("merged", 10, "4"))
    compare([one, two], [], None, tmp_path / "out", [])
    rows = compared(tmp_path / "out")
    assert {name: values["chat"] for name, values in rows.items()} == {
        "base": 0, "cpt": 0.25, "one:merged": 1, "two:merged": 0.5
    }  # fmt: skip
    said = capsys.readouterr().err
    assert "one:merged: ko chat +100" in " ".join(said.split())
    assert (tmp_path / "out" / "report.html").is_file()


def test_rows_can_be_chosen_named_and_measured_against_any(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = evaluated(tmp_path / "one", BASE, model("cpt", 5, "2"), model("merged", 20, "3"))
    arguments = ["compare", str(run), "--models", "half=cpt, merged", "--baseline", "half"]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 0
    assert list(compared(tmp_path / "out")) == ["half", "merged"]
    results = json.loads((tmp_path / "out" / "evaluation" / "results.json").read_text())
    assert results["models"]["merged"]["differences"]["ko"]["chat"]["value"] == pytest.approx(0.75)


def test_what_was_asked_otherwise_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = evaluated(tmp_path / "one", BASE)
    two = evaluated(tmp_path / "two", BASE, model("merged", 10, "4"), language="other texts")
    compare([one, two], [], None, tmp_path / "out", [])
    assert compared(tmp_path / "out") == {"base": {"chat": 0}, "merged": {"chat": 0.5}}
    said = " ".join(capsys.readouterr().err.split())
    assert "language is left out: other prompts, texts or settings (one and two)" in said


def test_wins_over_other_baselines_are_left_out(tmp_path: Path) -> None:
    one = evaluated(tmp_path / "one", BASE, model("merged", 10, "2", wins=20))
    compare([one], [], None, tmp_path / "same", [])
    assert compared(tmp_path / "same")["merged"]["judge_preferred"] == 1
    other = replace(BASE, fingerprint="9")
    two = evaluated(tmp_path / "two", other, model("merged", 10, "3", wins=5))
    compare([one, two], [], "one:base", tmp_path / "others", [])
    assert "judge_preferred" not in compared(tmp_path / "others")["one:merged"]


def test_what_is_refused(tmp_path: Path) -> None:
    one = evaluated(tmp_path / "one", BASE)
    two = evaluated(tmp_path / "two", BASE, language="others", form="others")
    again = evaluated(tmp_path / "more" / "one", BASE)
    damaged, empty = tmp_path / "damaged", tmp_path / "empty"
    for folder in (damaged, empty):
        folder.mkdir()
    (damaged / FILE).write_text("{}")
    for runs, chosen, baseline, sentence in (
        ([one, two], [], None, "one, two were evaluated on other prompts"),
        ([one, again], [], None, "is the second run of the name one"),
        ([tmp_path / "no"], [], None, "there is no run"),
        ([empty], [], None, "no evaluation has finished there"),
        ([damaged], [], None, r"measured.json is damaged \(Field required\)"),
        ([one], ["a=chat"], None, "no model is called chat; there are base"),
        ([one], ["base", "base"], None, "names base twice"),
        ([one], [], "chat", "--baseline chat is no row; there are base"),
    ):
        with pytest.raises(UserError, match=sentence):
            compare(runs, chosen, baseline, tmp_path / "out", [])
    assert not (tmp_path / "out").exists()


def asked(
    config: EvaluationConfig, prompt: str = "왜?", text: str = "글", dialogues: int = 0
) -> dict[str, str]:
    conversation = Conversation("ko", (Turn([{"role": "user", "content": prompt}]),))
    evaluators = [
        LanguageEvaluator(config, {"ko": [text]}),
        FormEvaluator([conversation]),
        DialogueEvaluator([conversation] * dialogues),
    ]
    return Measured.of(config, evaluators, Results([], {}, {}, {}, {}, {}, "base"), {}).asked


def test_what_makes_evaluations_comparable(tmp_path: Path) -> None:
    """What is asked and how, and not where it lies or who generates."""
    config = EvaluationConfig()
    before = asked(config)
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text('{"language": "ko", "prompt": "왜?"}\n')
    a, b = (EvaluationConfig(prompts=str(tmp_path / name)) for name in ("a.jsonl", "b.jsonl"))
    assert asked(a) == asked(b)
    assert asked(EvaluationConfig(batch_size=3, models={"x": "y"}, samples_shown=0)) == before
    warm = asked(EvaluationConfig(temperature=1.0))
    assert warm["form"] != before["form"]
    assert asked(config, prompt="뭐?")["form"] != before["form"]
    assert asked(config, prompt="뭐?")["language"] == before["language"]
    assert asked(config, dialogues=1)["form"] != before["form"], "it reads all replies"
    for other in (asked(config, text="말"), asked(EvaluationConfig(context=64))):
        assert other["language"] != before["language"]
        assert other["form"] == before["form"]
