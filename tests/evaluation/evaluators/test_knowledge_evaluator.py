"""Tasks of lm-eval: on a tiny model with tasks from a folder, and how its values become metrics. No network."""

import json
import logging
from types import SimpleNamespace

import datasets
import pytest
import yaml

import cpt_merge.evaluation.config
from cpt_merge.core.errors import UserError
from cpt_merge.evaluation.config import EvaluationConfig, KnowledgeConfig
from cpt_merge.evaluation.evaluators.knowledge import (
    NO_TASKS,
    KnowledgeEvaluator,
    _load,
    load_tasks,
    means,
    metrics_of,
    reported,
)
from cpt_merge.evaluation.run import run
from cpt_merge.evaluation.statistics import estimate
from cpt_merge.tracking import Tracker
from tests.distributed import run_ranks
from tests.evaluation.thinkers import OPENS_THOUGHT, write_thinker

SUMS = [
    {"q": f"{a} + {b}", "options": [str(a + b), str(a + b + 1), str(a - b)]}
    for a in range(4)
    for b in range(3)
]
CHOICE = {
    "output_type": "multiple_choice", "doc_to_text": "{{q}} =", "doc_to_choice": "{{options}}", "doc_to_target": 0,
    "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")],
}  # fmt: skip
WRITE = {
    "output_type": "generate_until", "doc_to_text": "{{q}} =", "doc_to_target": "{{options[0]}}",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4, "do_sample": False},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}  # fmt: skip
ROLLING = {
    "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{q}}",
    "metric_list": [{"metric": "bits_per_byte"}],
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = "\n".join(map(json.dumps, SUMS))
    for name, task in (
        ("sums", CHOICE),
        ("more_sums", CHOICE),
        ("writing", WRITE),
        ("rolling", ROLLING),
    ):
        (folder / f"{name}.jsonl").write_text(rows, encoding="utf-8")
        data = {
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}},
        }
        content = yaml.safe_dump({"task": name, "test_split": "test", **data, **task})
        (folder / f"{name}.yaml").write_text(content, encoding="utf-8")
    (folder / "group.yaml").write_text(
        yaml.safe_dump({"group": "all_sums", "task": ["sums", "more_sums"]}), "utf-8"
    )
    return folder


def results_of(samples, reported, better=True):
    return {
        "samples": {
            leaf: [{"filter": "none", "metrics": ["acc"], "acc": value} for value in values]
            for leaf, values in samples.items()
        },
        "results": {
            leaf: {"acc,none": value, "alias": leaf, "acc_stderr,none": 0.1}
            for leaf, value in reported.items()
        },
        "higher_is_better": {leaf: {"acc": better} for leaf in samples},
        "versions": dict.fromkeys(reported, 2),
        "n-shot": dict.fromkeys(reported, 5),
    }


def test_a_group_is_the_mean_over_all_its_questions_and_is_shown_by_task():
    results = results_of({"a": [1, 0, True], "b": [0.0]}, {"a": 2 / 3, "b": 0.0, "both": 0.5})
    found = {one.group: estimate(one.parts) for one in metrics_of("both", "ko", results)}
    assert {group: (one.value, one.n) for group, one in found.items()} == {
        "": (0.5, 4), "a": (pytest.approx(2 / 3), 3), "b": (0, 1),
    }  # fmt: skip
    (metric,) = {one.metric for one in metrics_of("both", "ko", results)}
    assert (metric.name, metric.rising, metric.share) == ("both_acc", True, True)
    assert reported(results)["a"] == {"acc,none": pytest.approx(2 / 3), "version": 2, "few_shot": 5}


def test_a_metric_that_is_no_mean_over_questions_has_no_interval():
    assert means(results_of({"a": [1.0, 0.0]}, {"a": 0.7}), "a") == {}, (
        "lm-eval aggregates it otherwise"
    )
    assert means(results_of({"a": [(-3.0, 4)]}, {"a": 1.1}), "a") == {}


def test_a_metric_that_should_be_low_is_marked_so():
    (measured,) = metrics_of("a", "ko", results_of({"a": [3.0, 5.0]}, {"a": 4.0}, better=False))
    assert (measured.metric.rising, measured.metric.share) == (False, False)


def test_without_tasks_the_metric_is_not_run():
    findings = KnowledgeEvaluator(EvaluationConfig(suites=["knowledge"])).measure(None, [])
    assert [(one.metric, one.reason) for one in findings.not_run] == [("knowledge", NO_TASKS)]


def test_without_lm_eval_the_message_names_what_to_install(monkeypatch):
    monkeypatch.setattr(cpt_merge.evaluation.config, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"lm-eval, which is not installed; run pip install .*\[eval\]"
    ):
        KnowledgeEvaluator(config_of({"tasks": {"kmmlu": "ko"}}))


def test_a_line_of_a_task_that_is_not_json_is_named_in_one_sentence(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    path = tmp_path / "sums.jsonl"
    monkeypatch.setattr(logging.getLogger("datasets"), "handlers", [caplog.handler])
    path.write_text('{"question": "1 + 1"}\n{"question": oops}\n')
    manager = SimpleNamespace(
        all_tasks=["sums"],
        load=lambda names: datasets.load_dataset("json", data_files=str(path), cache_dir=tmp_path),
    )
    with pytest.raises(UserError, match=r"knowledge.tasks: sums: .*sums.jsonl: line 2 is not JSON"):
        _load(manager, "sums", None, 0)
    assert "Failed to load" not in caplog.text


def test_an_unknown_language_of_a_task_is_an_error():
    with pytest.raises(ValueError, match="language 'kr' is not known"):
        KnowledgeConfig(tasks={"kmmlu": "kr"})


def config_of(knowledge):
    return EvaluationConfig(suites=["knowledge"], knowledge=knowledge, batch_size=1)


def evaluate(knowledge, models, out):
    out.mkdir(exist_ok=True)
    config = config_of({"chat_template": "raw", **knowledge})
    run(config, models, {}, None, out, Tracker())


def evaluated(knowledge, models, out):
    evaluate(knowledge, models, out)
    return json.loads((out / "results.json").read_text())["models"]


@pytest.mark.slow  # lm-eval takes seconds to import
class TestWithLmEval:
    @pytest.fixture(autouse=True)
    def offline(self, monkeypatch):
        pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")

    def test_local_tasks_on_two_models_by_one_and_two_processes(
        self, folder, models_of_two_vocabularies, tmp_path, capsys
    ):
        settings = {
            "tasks": {"all_sums": "en", "writing": "en", "rolling": "ko"}, "folder": str(folder), "few_shot": 1,
        }  # fmt: skip
        alone = evaluated(settings, models_of_two_vocabularies, tmp_path / "1")
        scores = alone["chat"]["scores"]["en"]
        assert {name: found["n"] for name, found in scores.items()} == {
            "all_sums_acc": 24, "all_sums_acc_norm": 24, "writing_exact_match": 12,
        }  # fmt: skip
        assert set(alone["chat"]["breakdowns"]["en"]["all_sums_acc"]) == {"sums", "more_sums"}
        assert alone["chat"]["differences"]["en"]["all_sums_acc"]["n"] == 24
        kept = alone["chat"]["knowledge"]
        assert kept["all_sums"]["sums"]["acc,none"] == pytest.approx(
            scores["all_sums_acc"]["value"]
        )
        assert kept["all_sums"]["sums"]["few_shot"] == 1
        assert kept["rolling"]["rolling"]["bits_per_byte,none"] > 0
        assert "rolling: no metric is a mean over questions" in capsys.readouterr().err
        run_ranks(evaluate, 2, settings, models_of_two_vocabularies, tmp_path / "2")
        assert json.loads((tmp_path / "2/results.json").read_text())["models"] == alone

    def test_the_numbers_equal_those_of_lm_eval_itself(
        self, folder, models_of_two_vocabularies, tmp_path
    ):
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager

        chat = models_of_two_vocabularies["chat"]
        ours = evaluated(
            {"tasks": {"sums": "en", "writing": "en", "rolling": "en"}, "folder": str(folder)},
            {"chat": chat},
            tmp_path / "o",
        )
        theirs = simple_evaluate(
            "hf", {"pretrained": str(chat), "dtype": "float32"}, ["sums", "writing", "rolling"], device="cpu",
            task_manager=TaskManager(include_path=str(folder)), bootstrap_iters=0,
        )["results"]  # fmt: skip
        for name, found in ours["chat"]["knowledge"].items():
            for metric, value in found[name].items():
                if "," in metric:
                    assert value == pytest.approx(theirs[name][metric], rel=1e-5), (name, metric)

    def test_in_the_chat_template(self, folder, models_of_two_vocabularies, tmp_path, capsys):
        settings = {"tasks": {"sums": "en"}, "folder": str(folder), "limit": 5}
        plain = evaluated(settings, models_of_two_vocabularies, tmp_path / "plain")
        assert "has no chat template" not in capsys.readouterr().err, "none is needed"
        both = evaluated(
            {**settings, "chat_template": "both"}, models_of_two_vocabularies, tmp_path / "both"
        )
        said = capsys.readouterr().err
        assert "base: has no chat template; it is prompted in that of" in said
        assert "chat: questions are asked in the chat template" in said
        for name in ("base", "chat"):
            kept, raw = both[name]["knowledge"], plain[name]["knowledge"]
            assert kept.keys() == {"sums", "sums_chat"}
            assert kept["sums"] == raw["sums"]
            assert both[name]["scores"]["en"]["sums_acc_chat"]["n"] == 5
        assert any(
            both[one]["knowledge"]["sums_chat"] != both[one]["knowledge"]["sums"] for one in both
        )

    def test_each_model_is_asked_in_its_own_way(
        self, folder, models_of_two_vocabularies, tmp_path, capsys
    ):
        settings = {"tasks": {"sums": "en"}, "folder": str(folder), "limit": 5}
        chat = models_of_two_vocabularies["chat"]
        models = {**models_of_two_vocabularies, "cpt": chat, "sft": chat, "merged": chat}
        ways = {"chat_template": "by_model", "chat_template_of": {"sft": "both"}}
        found = evaluated({**settings, **ways}, models, tmp_path / "found")
        names = {name: set(one["scores"]["en"]) for name, one in found.items()}
        raw, chat = {"sums_acc", "sums_acc_norm"}, {"sums_acc_chat", "sums_acc_norm_chat"}
        assert names == {"base": raw, "chat": chat, "cpt": raw, "sft": raw | chat, "merged": chat}
        assert "base: questions are asked raw" in capsys.readouterr().err
        with pytest.raises(UserError, match=r"chat_template_of names sfd, which is none of"):
            evaluated({**settings, "chat_template_of": {"sfd": "raw"}}, models, tmp_path / "no")

    def test_thoughts_are_no_answers_and_variables_reach_the_template(
        self, folder, tmp_path, capsys
    ):
        """It answers 3, which is right for 3 of 12 sums, and would be cut off in its thought."""
        thinks = ["<think>", "5\n6", "</think>", "3", "</s>"]
        models = {
            "chat": write_thinker(tmp_path / "chat", thinks),
            "merged": write_thinker(tmp_path / "merged", ["3", "</s>"], after=["</think>"]),
        }
        settings = {"tasks": {"writing": "en"}, "folder": str(folder), "chat_template": "template"}
        config = config_of(settings)
        off = {"merged": {"enable_thinking": False}}
        config = config.model_copy(update={"chat_template_kwargs": off})
        found = run(config, models, {}, None, tmp_path / "out", Tracker())
        assert found["chat/en/writing_exact_match_chat"] == 0.25
        assert found["merged/en/writing_exact_match_chat"] == 0.25
        opens = write_thinker(tmp_path / "opens", ["3", "</s>"], OPENS_THOUGHT, after=["\n"])
        evaluate({**settings, "tasks": {"sums": "en"}}, {"chat": opens}, tmp_path / "choices")
        assert "its chat template opens a thought" in " ".join(capsys.readouterr().err.split())

    def test_errors_are_reported_before_a_model_is_loaded(self, folder):
        broken = folder / "broken.yaml"
        broken.write_text(yaml.safe_dump({"task": "broken", "dataset_path": "json", **CHOICE, "dataset_kwargs": {
            "data_files": {"test": "/nowhere.jsonl"}}, "test_split": "test"}), "utf-8")  # fmt: skip
        for settings, sentence in [
            (
                {"tasks": {"sumz": "en"}, "folder": str(folder)},
                "lm-eval has no task sumz; similar are .*sums",
            ),
            (
                {"tasks": {"sums": "en"}, "folder": "/nowhere"},
                "knowledge.folder = /nowhere is no folder",
            ),
            (
                {"tasks": {"broken": "en"}, "folder": str(folder)},
                "broken cannot be loaded .*nowhere.jsonl",
            ),
        ]:
            with pytest.raises(UserError, match=sentence):
                load_tasks(config_of(settings))
