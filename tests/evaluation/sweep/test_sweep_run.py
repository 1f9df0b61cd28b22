"""The ratio sweep: the weights of a merge, points that are kept, the rule that recommends, the search."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from cpt_merge.core.errors import UserError
from cpt_merge.evaluation.config import EvaluationConfig, JudgeConfig
from cpt_merge.evaluation.models import LanguageModel
from cpt_merge.evaluation.statistics import Estimate
from cpt_merge.evaluation.sweep import run as sweep_run
from cpt_merge.evaluation.sweep.config import RecommendConfig, SweepConfig
from cpt_merge.evaluation.sweep.model import MergedModel
from cpt_merge.evaluation.sweep.points import Point
from cpt_merge.evaluation.sweep.recommend import rate, recommend
from cpt_merge.evaluation.sweep.run import SweepInputs, run
from cpt_merge.merge import MergeConfig
from cpt_merge.merge.files import merge_directories as merge
from cpt_merge.merge.plan import MergeInputs, plan
from cpt_merge.tracking import Tracker, TrackingConfig, read_log, start_tracker
from tests.distributed import run_ranks
from tests.evaluation.conftest import TEMPLATE, make_model
from tests.evaluation.http_server import completion

EVALUATION = EvaluationConfig(
    max_new_tokens=6, documents=3, context=32, languages=["ko", "zh_tw"], batch_size=4
)
SWEEP: dict[str, Any] = {
    "ratios": "0:1:0.5", "suites": ["language", "form"], "recommend": {"quality": "keeps_format"}, "max_prompts": 2,
}  # fmt: skip


def near(model: Path, directory: Path, seed: int, template: str | None = None) -> Path:
    """A sibling of a model, its weights a little changed."""
    shutil.copytree(model, directory)
    sibling = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in sibling.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    sibling.save_pretrained(directory)
    if template:
        (directory / "chat_template.jinja").write_text(template)
    return directory


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, corpus) -> SweepInputs:
    root = tmp_path_factory.mktemp("pair")
    base = near(make_model(root / "seed", vocabulary=300, seed=1), root / "base", 1)
    chat, cpt = near(base, root / "chat", 2, TEMPLATE), near(base, root / "cpt", 3)
    return SweepInputs(MergeInputs(cpt, base, chat, cpt), corpus, ["ko", "zh_tw"], {"cpt": "1"})


@pytest.fixture
def evaluation(prompts_file) -> EvaluationConfig:
    return EVALUATION.model_copy(update={"prompts": str(prompts_file)})


def sweep(inputs, evaluation, out, tracker: Tracker | None = None, **changes) -> dict[str, Any]:
    out.mkdir(exist_ok=True)
    settings = SweepConfig(**{**SWEEP, **changes})
    return run(settings, evaluation, MergeConfig(), inputs, out, tracker or Tracker())


def measured_points(monkeypatch, until: int = 1000) -> list[int]:
    """Counts the points that are measured; at `until` it is stopped, as by a signal."""
    calls: list[int] = []
    original = sweep_run.measure

    def counting(*arguments):
        if len(calls) == until:
            raise KeyboardInterrupt
        calls.append(1)
        return original(*arguments)

    monkeypatch.setattr(sweep_run, "measure", counting)
    return calls


@pytest.mark.parametrize(
    "settings", [{}, {"rules": [{"kinds": ["embed"], "ratio": 0.5}]}], ids=["plain", "rules"]
)
def test_ratio_1_is_byte_for_byte_what_the_merge_writes(inputs, tmp_path, settings):
    """Whatever ratio was tried before: every merge starts from the checkpoint."""
    model = MergedModel(plan(MergeConfig(**settings), inputs.merge), 0)
    for ratio in (0.3, 0.7, 1.0):
        model.merge(MergeConfig(ratio=ratio, **settings))
    merge(MergeConfig(ratio=1.0, **settings), inputs.merge, tmp_path / "merged", Tracker())
    written = LanguageModel.open("merged", tmp_path / "merged")
    state = model.model.loaded.state_dict()
    stored = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    assert stored.keys() == state.keys() == written.loaded.state_dict().keys()
    for name, values in stored.items():
        assert values.dtype == torch.bfloat16
        assert torch.equal(state[name], written.loaded.state_dict()[name]), name
        assert torch.equal(state[name].bfloat16().view(torch.int16), values.view(torch.int16)), name
    assert model.model.tokenizer.chat_template == written.tokenizer.chat_template == TEMPLATE
    assert model.model.tokenizer.get_vocab() == written.tokenizer.get_vocab()
    assert model.template.end_tokens == ["</s>"]


def test_a_sweep_leaves_results_curves_and_samples(inputs, evaluation, tmp_path):
    summary = sweep(inputs, evaluation, tmp_path / "out")
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [point["ratios"]["all"] for point in results["points"]] == [0.0, 0.5, 1.0]
    assert results["recommended"] == summary["recommended"]
    assert summary["points"] == 3
    for point in results["points"]:
        assert set(point["metrics"]) == {"zh_tw", "ko", "en"}
        assert set(point["metrics"]["ko"]) >= {
            "bits_per_byte",
            "chat",
            "in_language",
            "keeps_format",
        }
        rows = (tmp_path / "out" / point["samples"]).read_text(encoding="utf-8").splitlines()
        assert len(rows) == 4  # two prompts in each of the two languages that are asked about
        assert json.loads(rows[0])["ratios"] == point["ratios"]
    assert (tmp_path / "out" / "curves.png").stat().st_size > 10_000
    assert not list((tmp_path / "out").rglob("*.safetensors"))


def test_the_log_has_the_metrics_of_the_rule(inputs, evaluation, tmp_path):
    tracker = start_tracker(
        TrackingConfig(mode="disabled"), "sweep", "n", "g", tmp_path / "log", {}, "id"
    )
    sweep(
        inputs,
        evaluation,
        tmp_path / "out",
        tracker,
        recommend={"quality": "in_language", "tolerance": 1},
    )
    log, results = (
        read_log(tmp_path / "log"),
        json.loads((tmp_path / "out" / "results.json").read_text()),
    )
    table = log.tables["sweep/ratios"]
    assert table.columns == [
        "ratio",
        "in_language",
        "bits_per_byte",
        "beyond the limits",
        "recommended",
    ]
    assert [row[0] for row in table.rows] == ["0", "0.5", "1"]
    assert [row[-1] for row in table.rows] == [True, False, False], (
        "all are as good, so the smallest"
    )
    for row, point in zip(table.rows, results["points"], strict=True):
        of_new = [
            point["metrics"][language]["bits_per_byte"]["value"] for language in ("ko", "zh_tw")
        ]
        assert row[2] == pytest.approx(sum(of_new) / 2)
    assert log.summary["sweep/recommendation"] == results["why"]
    assert log.summary["sweep/recommended_ratio"] == 0
    assert log.tables["sweep/in_language"].columns == ["language", "ratio", "in_language"]


def test_measured_points_are_not_measured_again(inputs, evaluation, tmp_path, monkeypatch):
    measured = measured_points(monkeypatch)
    first = sweep(inputs, evaluation, tmp_path / "out")
    assert len(measured) == 3
    assert sweep(inputs, evaluation, tmp_path / "out") == first
    assert len(measured) == 3
    finer = sweep(
        inputs, evaluation, tmp_path / "out", ratios="0:1:0.25", recommend={"quality": "stopped"}
    )
    assert len(measured) == 5  # 0.25 and 0.75 were not there; another rule measures nothing anew
    assert finer["points"] == 5
    another = sweep(
        inputs, evaluation, tmp_path / "out", ratios=[0.25], recommend={"quality": "stopped"}
    )
    assert another == finer, "it adds to what is there"
    assert len(measured) == 5
    sweep(inputs, evaluation, tmp_path / "out", per_layer="ramp(0.5, 1)")
    sweep(replace(inputs, fingerprints={"cpt": "2"}), evaluation, tmp_path / "out")
    assert len(measured) == 11  # other merges, another model


def test_a_stopped_sweep_continues(inputs, evaluation, tmp_path, monkeypatch):
    whole = sweep(inputs, evaluation, tmp_path / "whole")
    with monkeypatch.context() as patch:
        measured_points(patch, until=2)
        with pytest.raises(KeyboardInterrupt):
            sweep(inputs, evaluation, tmp_path / "cut")
    assert json.loads((tmp_path / "cut" / "results.json").read_text())["recommended"] is None
    with (tmp_path / "cut" / "points.jsonl").open("a") as file:
        file.write('{"key": "cut sho')
    measured = measured_points(monkeypatch)
    assert sweep(inputs, evaluation, tmp_path / "cut") == whole
    assert len(measured) == 1


def test_a_point_whose_judge_failed_is_not_kept(
    inputs, evaluation, tmp_path, serve, monkeypatch, capsys
):
    questions = tmp_path / "questions.jsonl"
    questions.write_text(json.dumps({"language": "ko", "turns": ["왜?"]}), encoding="utf-8")
    alive = [True]

    def behave(number, body):
        return (200, completion("SCORE: 4")) if alive else (503, "no more")

    judge = {
        "url": serve(behave).url,
        "model": "m",
        "questions": str(questions),
        "cache": str(tmp_path),
        "attempts": 1,
    }
    rated = evaluation.model_copy(update={"judge": JudgeConfig.model_validate(judge)})
    rule = {"suites": ["chat"], "recommend": {"quality": "judge_mark"}}
    measured = measured_points(monkeypatch)
    sweep(inputs, rated, tmp_path / "out", ratios="0:0.5:0.5", **rule)
    assert len(measured) == 2
    points = json.loads((tmp_path / "out" / "results.json").read_text())["points"]
    assert points[0]["judges"]["m"]["requests"] == 1
    assert "judge m: 1 request, 0 more answered from the cache" in capsys.readouterr().err
    alive.clear()
    (tmp_path / "another").mkdir()
    elsewhere = rated.model_copy(
        update={"judge": rated.judge.model_copy(update={"cache": str(tmp_path / "another")})}
    )
    with pytest.raises(
        UserError, match=r"503 .*fix that and run the same command, which continues at ratio 0\."
    ):
        sweep(inputs, elsewhere, tmp_path / "out", **rule)
    alive.append(True)
    assert sweep(inputs, elsewhere, tmp_path / "out", ratios="0:0.5:0.5", **rule)["points"] == 2


def _on_a_rank(inputs, evaluation, out):
    torch.distributed.init_process_group("gloo")
    found = sweep(inputs, evaluation, Path(out))
    torch.distributed.destroy_process_group()
    return found


@pytest.mark.slow
def test_two_processes_give_the_results_of_one(inputs, evaluation, tmp_path):
    alone = sweep(inputs, evaluation, tmp_path / "one")
    assert run_ranks(_on_a_rank, 2, inputs, evaluation, str(tmp_path / "two")) == [alone, alone]


def test_the_search_keeps_its_budget_and_continues_as_if_uninterrupted(
    inputs, evaluation, tmp_path, monkeypatch
):
    pytest.importorskip("optuna")
    search = {"trials": 3, "kinds": ["attention", "mlp", "head"], "step": 0.25, "high": 1.0}
    whole = sweep(inputs, evaluation, tmp_path / "whole", search=search)
    assert whole["points"] == 6
    points = json.loads((tmp_path / "whole" / "results.json").read_text())["points"][3:]
    for point in points:
        assert set(point["ratios"]) == {"attention", "mlp", "head"}
        assert all(ratio in (0, 0.25, 0.5, 0.75, 1.0) for ratio in point["ratios"].values())
    with monkeypatch.context() as patch:
        measured_points(patch, until=4)
        with pytest.raises(KeyboardInterrupt):
            sweep(inputs, evaluation, tmp_path / "cut", search=search)
    assert sweep(inputs, evaluation, tmp_path / "cut", search=search) == whole


def test_a_search_over_kinds_that_the_model_lacks_is_refused(inputs, evaluation, tmp_path):
    pytest.importorskip("optuna")
    with pytest.raises(UserError, match=r"search\.kinds are other, which the model lacks"):
        sweep(inputs, evaluation, tmp_path / "out", search={"trials": 1, "kinds": ["other"]})


def test_a_chat_model_without_a_template_is_one_sentence(inputs, evaluation, tmp_path):
    chat = shutil.copytree(inputs.merge.chat, tmp_path / "chat")
    (chat / "chat_template.jinja").unlink()
    with pytest.raises(
        UserError, match=r"has no chat template, so the merged model cannot be prompted"
    ):
        sweep(replace(inputs, merge=replace(inputs.merge, chat=chat)), evaluation, tmp_path / "out")


def test_a_rule_with_a_metric_that_is_not_measured_is_refused_before_a_model_is_loaded(
    inputs, evaluation, tmp_path
):
    with pytest.raises(
        UserError, match=r"names dialogues, which sweep.suites language, form do not measure"
    ):
        sweep(inputs, evaluation, tmp_path / "out", recommend={"quality": "dialogues"})


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [("0:1.2:0.3", [0, 0.3, 0.6, 0.9, 1.2]), ("0.1:0.35:0.1", [0.1, 0.2, 0.3]), ("1,0.5", [0.5, 1]), ([1, 0, 1], [0, 1])],
)  # fmt: skip
def test_ratios_are_decimal_and_each_once(ratios, expected):
    assert SweepConfig(ratios=ratios).ratios == expected


@pytest.mark.parametrize(
    "ratios", ["0:1", "a:b:c", "1:0:0.1", "0:1:0", "0:1:-1", "0:1:0.00001", 60.1, [], "nan:1:1"]
)
def test_text_that_is_no_range_of_ratios_is_refused(ratios):
    with pytest.raises(ValidationError, match="ratios"):
        SweepConfig(ratios=ratios)


def point(
    ratios: dict[str, float], chat: float, bits: float = 1.0, in_language: float = 1.0
) -> Point:
    values = {"chat": chat, "bits_per_byte": bits, "in_language": in_language}
    metrics = {name: Estimate(value, value, value, 10) for name, value in values.items()}
    return Point(
        str(ratios), ratios, {"ko": metrics, "en": {"chat": Estimate(0.0, 0.0, 0.0, 10)}}, 0.1, 1.0
    )


def recommended(points: list[Point], **rule: Any) -> tuple[dict[str, float] | None, str]:
    settings = RecommendConfig(**rule)
    rated = [rate(one, settings, ["ko"], points[0]) for one in points]
    found = recommend(rated, settings)
    return found.point.ratios if found.point else None, found.sentence


LINE = [
    point({"all": 0.0}, 0.0, 1.0),
    point({"all": 0.6}, 0.79, 1.02, 0.99),
    point({"all": 0.8}, 0.80, 1.05, 0.95),
    point({"all": 1.0}, 0.90, 1.20, 0.60),
]


def test_the_smallest_of_the_best_ratios_within_the_limits_is_recommended():
    assert recommended(LINE)[0] == {"all": 0.6}
    assert recommended(LINE, tolerance=0.001)[0] == {"all": 0.8}
    assert recommended(LINE, bits_per_byte_rise=None)[0] == {"all": 1.0}
    assert recommended(LINE, bits_per_byte_rise=None, at_least={"in_language": 0.9}, tolerance=0)[
        0
    ] == {"all": 0.8}
    assert recommended(LINE, bits_per_byte_rise=None, at_most={"bits_per_byte": 1.03})[0] == {
        "all": 0.6
    }


def test_no_ratio_is_recommended_if_each_breaks_a_limit():
    chosen, sentence = recommended(LINE, at_least={"chat": 0.95})
    assert chosen is None
    assert (
        "every one breaks a limit of sweep.recommend; the nearest is 1 (chat 0.9 < 0.95" in sentence
    )


def test_ratios_by_kind_must_be_clearly_better():
    searched = point({"attention": 1.0, "mlp": 0.4}, 0.81)
    assert recommended([*LINE, searched])[0] == {"all": 0.6}
    better = point({"attention": 1.0, "mlp": 0.5}, 0.88)
    assert recommended([*LINE, searched, better])[0] == better.ratios
    smaller = point({"attention": 1.0, "mlp": 0.2}, 0.87)
    assert recommended([*LINE, better, smaller])[0] == smaller.ratios


def test_a_metric_that_was_not_measured_in_the_new_languages_is_named():
    with pytest.raises(UserError, match="names chat, which was not measured in zh_tw"):
        rate(LINE[0], RecommendConfig(), ["zh_tw"], LINE[0])
