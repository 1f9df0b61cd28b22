"""Suites of lm-eval's tasks: their names in lm-eval, and what a recipe may ask."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

from cpt_merge.core.config import parse_section
from cpt_merge.core.errors import UserError
from cpt_merge.core.languages import find_language
from cpt_merge.evaluation.config import EVALUATOR_SUITES, EvaluationConfig, KnowledgeConfig
from cpt_merge.evaluation.knowledge_suites import KNOWLEDGE_SUITES, LEFT_OUT, LmEvalTask
from cpt_merge.evaluation.suites import SUITES

INDEX = "from lm_eval.tasks import TaskManager; print(*TaskManager().all_tasks, sep=chr(10))"


@pytest.mark.slow  # lm-eval reads 15,000 YAML files
@pytest.mark.skipif(find_spec("lm_eval") is None, reason="the extra `eval` is not installed")
def test_every_name_is_in_the_index_of_the_installed_lm_eval():
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", INDEX], env=offline, capture_output=True, text=True, check=True
    )
    known = set(done.stdout.split())
    named = {task.name for tasks in KNOWLEDGE_SUITES.values() for task in tasks}
    assert named - known == set()
    assert set(LEFT_OUT) - known == set(), "what lm-eval no longer has need not be named"


def test_the_lists():
    named = [task for tasks in KNOWLEDGE_SUITES.values() for task in tasks]
    assert len({task.name for task in named}) == len(named)
    assert not {task.name for task in named} & set(LEFT_OUT)
    assert all(find_language(task.language).tag == task.language for task in named)
    assert set(SUITES) == {*EVALUATOR_SUITES, *KNOWLEDGE_SUITES}, "every suite can be made"


def tasks_of(suites, **knowledge):
    return EvaluationConfig(suites=suites, knowledge=knowledge).lm_eval_tasks


def test_the_tasks_of_a_recipe():
    assert tasks_of(["form"]) == []
    assert tasks_of(["form"], tasks={"mmlu": "en"}) == [], "only the suite `knowledge` has these"
    assert [task.name for task in tasks_of(["knowledge-zh_tw"])][:2] == ["tmmluplus", "tmlu"]
    both = tasks_of(["knowledge-ko", "knowledge", "domain-ko"], tasks={"kmmlu": "ko", "mmlu": "en"})
    assert both[0] == LmEvalTask("kmmlu", "ko"), "the recipe's own comes first, once"
    assert [task.name for task in both].count("kmmlu") == 1
    assert both[1] == LmEvalTask("mmlu", "en")
    assert {"haerae", "hrm8k"} < {task.name for task in both}


def test_a_task_of_a_suite_can_be_left_out():
    assert [one.name for one in tasks_of(["hard-ko"], without=["kmmlu_direct"])] == ["kmmlu_hard"]
    assert tasks_of(["form"], without=["kmmlu_direct"]) == [], "another suite may be chosen later"
    with pytest.raises(ValueError, match=r"without names kmlu, .* are kmmlu_direct, kmmlu_hard"):
        tasks_of(["hard-ko"], without=["kmlu"])


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("knowlege-ko", "there is no such suite; the nearest is knowledge-ko"),
        ("knowledge-zh-tw", "the nearest is knowledge-zh_tw"),
        ("saftey", "the nearest is safety"),
        ("zzz", "there is no such suite; there are language, form,"),
    ],
)
def test_an_unknown_suite_is_an_error_with_the_nearest_name(name, sentence):
    with pytest.raises(UserError) as raised:
        parse_section(EvaluationConfig, {"suites": ["chat", name]}, "my.yaml")
    assert f"`suites.1` = '{name}'" in str(raised.value)
    assert sentence in str(raised.value)


def test_the_way_in_which_a_model_is_asked():
    usual, both = KnowledgeConfig(), KnowledgeConfig(chat_template="both")
    ways = {name: usual.in_template(name, True) for name in ("base", "cpt", "chat", "merged", "x")}
    assert ways == {"base": [False], "cpt": [False], "chat": [True], "merged": [True], "x": [True]}
    assert usual.in_template("x", False) == [False]
    assert both.in_template("base", False) == [False, True]
    assert KnowledgeConfig(chat_template=True).in_template("base", True) == [True]
    assert KnowledgeConfig(chat_template=False).in_template("chat", True) == [False]
    assert KnowledgeConfig(chat_template_of={"base": "both"}).in_template("base", 0) == [
        False,
        True,
    ]
    assert (usual.needs_template, both.needs_template) == (False, True)


def test_suites_by_name_need_lm_eval(monkeypatch):
    monkeypatch.setattr("cpt_merge.evaluation.config.find_spec", lambda name: None)
    EvaluationConfig(suites=["form"]).check_lm_eval()
    with pytest.raises(UserError, match=r"lm-eval, which is not installed; run pip install .*eval"):
        EvaluationConfig(suites=["knowledge-ko"]).check_lm_eval()
