"""lm-eval's requests to a model that thinks: stop strings apply to the answer alone."""

from types import SimpleNamespace

from cpt_merge.core.distributed import Ranks
from cpt_merge.evaluation.chat_template import read_chat_template
from cpt_merge.evaluation.config import EvaluationConfig
from cpt_merge.evaluation.generate.lm_eval import answer_requests
from cpt_merge.evaluation.generate.transformers import TransformersEngine
from cpt_merge.evaluation.models import LanguageModel
from tests.evaluation.thinkers import write_thinker


def test_stop_strings_and_limits_are_those_of_the_answer(tmp_path, capsys):
    says = ["<think>", "음\n\n음", "</think>", "서울", "입니다.\n\n네", "!", "</s>"]
    directory = write_thinker(tmp_path / "m", says)
    model, template = LanguageModel.open("m", directory), read_chat_template(directory)
    prompt = template.render(model.tokenizer, [{"role": "user", "content": "?"}])
    settings = [
        {"until": ["\n\n"], "max_gen_toks": 9},
        {"until": [], "max_gen_toks": 1},
        {"until": "다", "do_sample": False},
    ]
    requests = [SimpleNamespace(args=(prompt, one)) for one in settings]
    config = EvaluationConfig(max_characters=1)
    answers = answer_requests(TransformersEngine(model, Ranks()), template, requests, config)
    assert answers == ["서울입니다.", "서울", "서울입니"]
    tight = EvaluationConfig(max_thought_tokens=2)
    assert answer_requests(TransformersEngine(model, Ranks()), template, requests[:1], tight) == [
        ""
    ]
    assert "1 of 1 replies ended within a thought" in " ".join(capsys.readouterr().err.split())
