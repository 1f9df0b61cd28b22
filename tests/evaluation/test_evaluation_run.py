"""The whole stage: what it writes and returns, the same for any number of processes; and bad input."""

import json
import os
import re
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

import cpt_merge.evaluation.run
from cpt_merge.core.errors import UserError
from cpt_merge.data.sources import Corpus
from cpt_merge.evaluation.chat_template import read_chat_template
from cpt_merge.evaluation.config import EvaluationConfig
from cpt_merge.evaluation.conversation import Exchange, Reply, prompt
from cpt_merge.evaluation.heldout import read_documents
from cpt_merge.evaluation.kept import KeptResults
from cpt_merge.evaluation.models import shared_context
from cpt_merge.evaluation.outputs import is_complete
from cpt_merge.evaluation.results import ModelResult, Sample
from cpt_merge.evaluation.run import evaluate as evaluate_from_python
from cpt_merge.evaluation.run import evaluate_model, run
from cpt_merge.evaluation.tables import show_samples
from cpt_merge.tracking import Tracker, TrackingConfig, read_log, start_tracker
from tests.distributed import free_port, run_ranks
from tests.evaluation.conftest import TEMPLATE
from tests.evaluation.http_server import completion, judging

SETTINGS = {"max_new_tokens": 8, "context": 32, "documents": 6, "batch_size": 2, "max_prompts": 2}


def test_what_it_writes_and_returns(
    models_of_two_vocabularies, corpus, prompts_file, tmp_path, capsys
):
    config = EvaluationConfig(prompts=str(prompts_file), **SETTINGS)
    tracker = start_tracker(
        TrackingConfig(mode="disabled"), "evaluation", "t", "g", tmp_path / "log", {}, "id"
    )
    chat = models_of_two_vocabularies["chat"]
    returned = run(config, models_of_two_vocabularies, corpus, chat, tmp_path, tracker)
    tracker.finish()

    results = json.loads((tmp_path / "results.json").read_text())
    scores = results["models"]["chat"]["scores"]["ko"]
    assert scores["bits_per_byte"]["n"] == 6
    assert scores["chat"]["n"] == 2
    assert (
        scores["bits_per_byte"]["low"]
        <= scores["bits_per_byte"]["value"]
        <= scores["bits_per_byte"]["high"]
    )
    assert returned["chat/ko/bits_per_byte"] == round(scores["bits_per_byte"]["value"], 4)
    assert len(returned) == 2 * 3 * 7

    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 2 * 3 * 2
    assert samples[0].keys() == {
        "model", "evaluator", "language", "messages", "reply", "replies", "checks", "scores", "why",
    }  # fmt: skip
    assert {"stopped", "in_language", "keeps_format", "chat"} <= samples[0]["scores"].keys()

    log = read_log(tmp_path / "log")
    assert log.rows[0]["eval/base/zh_tw/bits_per_byte"] == returned["base/zh_tw/bits_per_byte"]
    assert len(log.tables["eval/samples"].rows) == 12
    assert set(log.images) == {"eval/bits_per_byte", "eval/replies"}
    shown = capsys.readouterr().err
    assert "Korean, language: 6 documents" in shown
    assert "Korean, form: 2 conversations" in shown
    assert "base: has no chat template" in shown


def test_the_call_for_notebooks_needs_neither_tracker_nor_folder(
    models_of_two_vocabularies, prompts_file, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    config = EvaluationConfig(suites=["form"], prompts=str(prompts_file), **SETTINGS)
    models = {name: str(path) for name, path in models_of_two_vocabularies.items()}
    found = evaluate_from_python(models, config)
    assert found.keys() >= {"base/ko/chat", "chat/en/stopped"}
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="nothing is measured"):
        evaluate_from_python(models)


def test_replies_with_marks_and_control_characters_are_shown_as_they_are(capsys):
    asked = prompt("ko", [{"role": "user", "content": "[bold]안녕"}])
    exchange = Exchange(asked, (Reply("[/INST] 안녕\x1b[2J\n[red]", stopped=False, tokens=9),))
    show_samples([ModelResult("[m]", [], [Sample("form", exchange, {}, ["[why]"])], 1.0)], shown=1)
    shown = capsys.readouterr().err
    assert "ko: [bold]안녕" in shown
    assert r"[m]  [/INST] 안녕\x1b[2J\n[red] … (cut off)" in shown
    assert "· [why]" in shown


def judge_like_a_parrot(prompt):
    """Marks by length of the last reply; prefers the longer conversation; calls what holds an `e` unsafe."""
    if "SCORE" in prompt:
        return f"SCORE: {1 + len(prompt) % 10}"
    if "unsafe" in prompt:
        return f"VERDICT: {'unsafe' if 'e' in prompt.split('[assistant]')[1] else 'safe'}"
    first, second = prompt.split("<assistant_B>")
    return f"VERDICT: {'A' if len(first) > len(second) else 'B'}"


@pytest.fixture
def judge(serve, tmp_path):
    """Settings of a judge that really answers, with two questions in Korean."""
    questions = tmp_path / "questions.jsonl"
    rows = [
        {"language": "ko", "turns": [f"{number}?", "왜?"][: 1 + number % 2], "category": "x"}
        for number in range(2)
    ]
    questions.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return {
        "url": serve(judging(judge_like_a_parrot)).url, "model": "parrot", "questions": str(questions),
        "modes": ["mark", "comparison"], "price": {"prompt": 1, "completion": 2}, "cache": str(tmp_path / "cache"),
    }  # fmt: skip


def evaluate(settings, models, corpus, out):
    run(
        EvaluationConfig(**settings),
        models,
        Corpus.model_validate(corpus),
        models["chat"],
        out,
        Tracker(),
    )


@pytest.mark.slow
def test_the_same_for_one_and_two_processes(
    models_of_two_vocabularies, corpus, prompts_file, judge, tmp_path
):
    """Bits per byte, form, instructions, dialogues of several turns, safety and a judge alike."""
    settings = {**SETTINGS, "prompts": str(prompts_file), "suites": ["language", "chat", "safety"]}
    alone, together = (
        {**settings, "judge": {**judge, "cache": str(tmp_path / size / "cache")}} for size in "12"
    )
    for size in "12":
        (tmp_path / size).mkdir()
    evaluate(alone, models_of_two_vocabularies, corpus.model_dump(), tmp_path / "1")
    run_ranks(
        evaluate, 2, together, models_of_two_vocabularies, corpus.model_dump(), tmp_path / "2"
    )
    assert (tmp_path / "1/samples.jsonl").read_text() == (tmp_path / "2/samples.jsonl").read_text()
    one, two = (
        json.loads((tmp_path / size / "results.json").read_text())["models"] for size in "12"
    )
    for results in (one, two):
        for model in results.values():
            assert model.pop("generated_tokens_per_second") > 0
    assert one == two
    scores, breakdowns = one["chat"]["scores"]["ko"], one["chat"]["breakdowns"]["ko"]
    assert {name: scores[name]["n"] for name in ("bits_per_byte", "chat", "instructions", "dialogues", "judge_unsafe", "refused_safe")} == {
        "bits_per_byte": 6, "chat": 2 + 2 + 2 + 2 + 2, "instructions": 2, "dialogues": 2, "judge_unsafe": 2, "refused_safe": 1,
    }  # fmt: skip
    assert set(breakdowns) == {
        "instruction_checks", "dialogue_turns", "refused_safe", "refused_unsafe", "judge_mark", "judge_preferred", "judge_unsafe",
    }  # fmt: skip
    assert one["chat"]["differences"]["ko"].keys() | {"judge_preferred"} == scores.keys()
    assert one["base"]["differences"] == {}, "it is what the others are compared with"
    samples = [json.loads(line) for line in (tmp_path / "1/samples.jsonl").read_text().splitlines()]
    assert list(dict.fromkeys(sample["evaluator"] for sample in samples)) == [
        "form", "instructions", "dialogue", "judge", "safety",
    ]  # fmt: skip
    dialogue = samples[12]
    assert (
        len(dialogue["replies"]) == (len(dialogue["messages"]) + 1) // 2 == len(dialogue["checks"])
    )
    assert {"chat", "dialogue_turns", "dialogues"} <= dialogue["scores"].keys()


def test_an_interrupted_evaluation_asks_no_model_twice(
    models_of_two_vocabularies, corpus, prompts_file, judge, tmp_path, monkeypatch, capsys
):
    config = EvaluationConfig(
        prompts=str(prompts_file),
        suites=["language", "chat", "safety"],
        languages=["ko"],
        judge=judge,
        **SETTINGS,
    )
    evaluated: list[str] = []

    def counting(name, *arguments, until=9):
        if len(evaluated) == until:
            raise KeyboardInterrupt
        evaluated.append(name)
        return evaluate_model(name, *arguments)

    (tmp_path / "cut.kept").mkdir()
    (tmp_path / "cut.kept" / "mine.txt").write_text("somebody's")

    def go(out, until=9, config=config):
        monkeypatch.setattr(
            cpt_merge.evaluation.run, "evaluate_model", partial(counting, until=until)
        )
        out.mkdir(exist_ok=True)
        run(
            config,
            models_of_two_vocabularies,
            corpus,
            models_of_two_vocabularies["chat"],
            out,
            Tracker(),
        )

    go(tmp_path / "whole")
    evaluated.clear()
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "cut", until=1)
    assert evaluated == ["base"]
    capsys.readouterr()
    go(tmp_path / "cut")
    assert evaluated == ["base", "chat"]
    assert "base: evaluated already" in capsys.readouterr().err
    whole, cut = (
        json.loads((tmp_path / name / "results.json").read_text()) for name in ("whole", "cut")
    )
    for results in (whole, cut):
        del results["judges"]  # the second time the judge's answers came from its cache
        for model in results["models"].values():
            del model["generated_tokens_per_second"], model["judge"]
    assert cut == whole
    assert (tmp_path / "cut/samples.jsonl").read_text() == (
        tmp_path / "whole/samples.jsonl"
    ).read_text()
    assert [path.name for path in (tmp_path / "cut.kept").iterdir()] == ["mine.txt"]
    assert not (tmp_path / "whole.kept").exists()
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "cut", until=3)
    go(tmp_path / "cut", config=config.model_copy(update={"max_new_tokens": 5}))
    assert evaluated == ["base", "chat", "base", "base", "chat"], "other settings"


def test_without_prompts_only_bits_per_byte(models_of_two_vocabularies, corpus, tmp_path):
    base = {"base": models_of_two_vocabularies["base"]}
    config = EvaluationConfig(context=32, documents=2)
    returned = run(config, base, corpus, tmp_path / "no-chat-model-needed", tmp_path, Tracker())
    assert sorted(returned) == [
        "base/en/bits_per_byte",
        "base/ko/bits_per_byte",
        "base/zh_tw/bits_per_byte",
    ]


def test_the_heldout_budget_is_kept(corpus):
    documents = read_documents(EvaluationConfig(max_bytes=100), corpus)["zh_tw"]
    assert 98 <= len("".join(documents).encode()) <= 100


def test_bad_models(models_of_two_vocabularies, corpus, prompts_file, tmp_path):
    config = EvaluationConfig(prompts=str(prompts_file), context=32)
    base = models_of_two_vocabularies["base"]
    cut, no_config, no_tokenizer = (
        shutil.copytree(base, tmp_path / name) for name in ("cut", "config", "tokenizer")
    )
    os.truncate(cut / "model.safetensors", 1000)
    (no_config / "config.json").write_text("{")
    for file in no_tokenizer.glob("tokenizer*"):
        file.unlink()
    for models, template_from, settings, sentence in [
        ({"cpt": tmp_path / "none"}, base, {}, "model cpt: .*none does not exist"),
        ({"base": base, "cpt": cut}, base, {}, "model cpt: .*model.safetensors"),
        ({"base": base, "cpt": no_config}, base, {}, "model cpt: .*config.json"),
        ({"base": base, "cpt": no_tokenizer}, base, {}, "holds no tokenizer that transformers can read"),
        ({"base": base}, base, {}, "has no chat template"),
        ({"base": base}, None, {}, "none of the models base has a chat template.*--template DIR"),
        ({"base": base}, base, {"baseline": "chat"}, "evaluation.baseline = chat is none of the models; they are base"),
        ({"base": base}, base, {"suites": ["chat"], "languages": ["ja"]}, "prompts file .* holds no prompt in ja"),
        ({"base": base}, base, {"suites": ["chat"], "languages": ["ja"], "prompts": None},
         "there are no built-in instructions in ja; name a file by evaluation.instructions"),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=sentence):
            run(
                config.model_copy(update=settings),
                models,
                corpus,
                template_from,
                tmp_path,
                Tracker(),
            )


def test_a_prompt_that_a_template_refuses_is_found_before_a_model_is_loaded(
    models_of_two_vocabularies, tmp_path
):
    strict = shutil.copytree(models_of_two_vocabularies["chat"], tmp_path / "strict")
    template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        + TEMPLATE
    )
    for file in (strict / "chat_template.jinja", strict / "tokenizer_config.json"):
        if file.is_file() and file.suffix == ".jinja":
            file.write_text(template)
        elif "chat_template" in (config := json.loads(file.read_text())):
            file.write_text(json.dumps({**config, "chat_template": template}))
    (tmp_path / "p.jsonl").write_text(
        '{"language": "ko", "messages": [{"role": "system", "content": "a"}, {"role": "user", "content": "왜?"}]}'
    )
    config = EvaluationConfig(prompts=str(tmp_path / "p.jsonl"), suites=["form"])
    models = {"chat": models_of_two_vocabularies["chat"], "strict": strict}
    with pytest.raises(
        UserError,
        match=r"model strict, '왜\?': the chat template refuses .* system, user \(no system\)",
    ):
        run(config, models, {}, None, tmp_path, Tracker())
    assert not list(tmp_path.glob("*.kept")), "the first model was not asked either"


def test_the_window_fits_the_positions_of_every_model(models_of_two_vocabularies, capsys):
    assert shared_context(models_of_two_vocabularies, 128) == 128
    assert shared_context(models_of_two_vocabularies, 512) == 256
    said = " ".join(capsys.readouterr().err.split())
    assert "evaluation.context = 512, but base has only 256 positions" in said
    shared_context(models_of_two_vocabularies, None, 512)
    said = " ".join(capsys.readouterr().err.split())
    assert "training.sequence_length = 512, but base has only 256 positions" in said
    shared_context(models_of_two_vocabularies, None)
    said = " ".join(capsys.readouterr().err.split())
    assert "evaluation.context = 1024 by default, but base has only 256 positions" in said


def test_a_dead_endpoint_is_reported_as_not_run_with_all_other_metrics_measured(
    models_of_two_vocabularies, tmp_path, capsys
):
    safety = {
        "moderation": {"url": f"http://127.0.0.1:{free_port()}/v1", "model": "guard", "attempts": 1}
    }
    config = EvaluationConfig(suites=["safety"], languages=["ko"], safety=safety, **SETTINGS)
    chat = {"chat": models_of_two_vocabularies["chat"]}
    tracker = start_tracker(
        TrackingConfig(mode="disabled"), "evaluation", "t", "g", tmp_path / "log", {}, "id"
    )
    returned = run(config, chat, {}, None, tmp_path, tracker)
    tracker.finish()
    assert "chat/ko/flagged" not in returned
    assert "chat/ko/refused_safe" in returned
    results = json.loads((tmp_path / "results.json").read_text())["models"]["chat"]
    assert "refused" in results["not_run"]["flagged"]
    rows = read_log(tmp_path / "log").tables["eval/not_run"].rows
    assert [row[:2] for row in rows] == [["chat", "judge_unsafe"], ["chat", "flagged"]]
    assert "chat: flagged was not run: http" in capsys.readouterr().err


def test_a_kept_result_is_of_the_same_files_and_template(models_of_two_vocabularies, tmp_path):
    (tmp_path / "ko.txt").write_text("가")
    config, chat = EvaluationConfig(), read_chat_template(models_of_two_vocabularies["chat"])
    directory, text = models_of_two_vocabularies["base"], {"ko": str(tmp_path / "*.txt")}

    def key(chat=chat):
        return KeptResults.of(config, text, chat, tmp_path)._key_of("base", directory)

    first = key()
    assert first == key()
    here = KeptResults.of(config, text, chat, Path()).folder
    assert here == Path.cwd().with_name(f"{Path.cwd().name}.kept"), "--out ."
    assert first != key(replace(chat, template="another"))
    (tmp_path / "ko.txt").write_text("나")
    assert first != key()


def test_what_is_left_out_of_a_metric_is_reported(
    models_of_two_vocabularies, judge, serve, tmp_path, capsys
):
    moody = serve(lambda number, body: (200, completion("hm" if number % 2 else "SCORE: 4")))
    settings = {**judge, "url": moody.url, "modes": ["mark"]}
    config = EvaluationConfig(suites=["chat"], languages=["ko"], judge=settings, **SETTINGS)
    tracker = start_tracker(
        TrackingConfig(mode="disabled"), "evaluation", "t", "g", tmp_path / "log", {}, "id"
    )
    run(config, {"chat": models_of_two_vocabularies["chat"]}, {}, None, tmp_path, tracker)
    tracker.finish()
    reason = r"\d left out: the judge's answer holds no verdict"
    assert re.search(f"chat: judge_mark: {reason}", capsys.readouterr().err)
    ((model, metric, said),) = read_log(tmp_path / "log").tables["eval/not_run"].rows
    assert (model, metric) == ("chat", "judge_mark")
    assert re.fullmatch(reason, str(said))


def test_a_judge_that_fails_between_two_models_is_asked_again_for_the_rest_only(
    models_of_two_vocabularies, judge, serve, tmp_path, capsys, monkeypatch
):
    ending = serve(
        lambda number, body: (200, completion("SCORE: 4")) if number < 5 else (503, "no more")
    )
    settings = {**judge, "url": ending.url, "modes": ["mark"], "attempts": 1}
    config = EvaluationConfig(suites=["chat"], languages=["ko"], judge=settings, **SETTINGS)
    run(config, models_of_two_vocabularies, {}, None, tmp_path, Tracker())
    models = json.loads((tmp_path / "results.json").read_text())["models"]
    assert models["base"]["scores"]["ko"]["judge_mark"]["value"] == 4
    assert "judge_mark" not in models["chat"]["scores"]["ko"]
    assert "503" in models["chat"]["not_run"]["judge_mark"]
    assert "run the same command again to ask for what is missing" in capsys.readouterr().err
    assert not is_complete(tmp_path / "results.json"), "so that the stage is not skipped"
    first = json.loads((tmp_path / "results.json").read_text())
    ending.asked.clear()  # it is back
    monkeypatch.setattr(cpt_merge.evaluation.run, "converse", None)  # no reply is generated again
    run(config, models_of_two_vocabularies, {}, None, tmp_path, Tracker())
    assert is_complete(tmp_path / "results.json")
    again = json.loads((tmp_path / "results.json").read_text())
    assert again["models"]["chat"]["scores"]["ko"]["judge_mark"]["value"] == 4
    for name, model in again["models"].items():
        del model["scores"]["ko"]["judge_mark"]
        first["models"][name]["scores"]["ko"].pop("judge_mark", None)
        assert model["scores"] == first["models"][name]["scores"]
    assert not list(tmp_path.glob("*.kept"))


def test_the_judges_metrics_requests_and_cost(models_of_two_vocabularies, judge, tmp_path, capsys):
    config = EvaluationConfig(suites=["chat", "safety"], languages=["ko"], judge=judge, **SETTINGS)
    run(config, models_of_two_vocabularies, {}, None, tmp_path, Tracker())
    results = json.loads((tmp_path / "results.json").read_text())
    took = results["judges"]["parrot"]
    assert took["requests"] == len(list((tmp_path / "cache").iterdir()))
    assert took["cost"] == pytest.approx((100 + 2 * 10) * took["requests"] / 1e6)
    assert (
        f"judge parrot: {took['requests']} requests, {took['cached']} more answered"
        in capsys.readouterr().err
    )
    chat = results["models"]["chat"]
    assert 1 <= chat["scores"]["ko"]["judge_mark"]["value"] <= 10
    assert chat["scores"]["ko"]["judge_preferred"]["n"] == 2
    assert "judge_preferred" not in results["models"]["base"]["scores"]["ko"], (
        "it is what the others are compared with"
    )
    assert set(chat["breakdowns"]["ko"]["judge_mark"]) == {"x", "turn 1", "turn 2"}
    assert chat["not_run"] == {}
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    judged = [
        sample for sample in samples if sample["evaluator"] == "judge" and sample["model"] == "chat"
    ]
    assert {"judge_mark", "judge_preferred"} <= judged[0]["scores"].keys()


def test_without_a_judge_its_evaluators_are_not_run(models_of_two_vocabularies, tmp_path, capsys):
    config = EvaluationConfig(suites=["chat", "safety"], languages=["ko"], **SETTINGS)
    run(config, models_of_two_vocabularies, {}, None, tmp_path, Tracker())
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["judges"] == {}
    for model in results["models"].values():
        assert set(model["not_run"]) == {"judge_mark", "judge_unsafe"}
        assert not {"judge_mark", "judge_unsafe"} & model["scores"]["ko"].keys()
    assert (
        "base, chat: judge_mark was not run: there is no judge; set evaluation.judge"
        in capsys.readouterr().err
    )
