import json

import pytest

from cpt_merge.merge import MergeConfig, finish
from cpt_merge.merge.card import model_card
from cpt_merge.merge.plan import plan
from tests.merge.conftest import write_config
from tests.merge.test_merge_files import inputs_of


def differences(family, **chat):
    write_config(family.chat, 40, False, **chat)
    return finish.config_differences(plan(MergeConfig(), inputs_of(family)))


def test_both_ways_of_writing_rope_are_one(untied):
    assert differences(untied) == []
    new = {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}}
    assert differences(untied, rope_theta=None, **new) == []
    scaled = {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "linear", "factor": 2.0}}
    assert "rope_scaling" in differences(untied, rope_theta=None, **scaled)[0]


def test_every_difference_is_named(untied):
    found = differences(untied, max_position_embeddings=4096, rms_norm_eps=1e-6)
    assert len(found) == 2
    assert "max_position_embeddings is 128 in cpt, 128 in base, 4096 in chat" in found


@pytest.mark.parametrize(
    ("base", "chat", "line"),
    [
        ("mit", "mit", "license: mit"),
        ("mit", "llama3", "license: other"),
        (None, None, "library_name"),
    ],
)
def test_licences_are_carried(untied, base, chat, line):
    for model, licence in (("base", base), ("chat", chat)):
        text = f"---\nlicense: {licence}\n---\n" if licence else "no front matter"
        (untied.root / model / "README.md").write_text(text)
    the_plan = plan(MergeConfig(), inputs_of(untied))
    card = model_card(the_plan, {"inputs": {}, "versions": {}}, {"rows": {}})
    assert line in card


def test_an_id_without_a_token_is_left_out(untied, capsys):
    (untied.chat / "generation_config.json").write_text('{"eos_token_id": [2, 39]}')
    the_plan = plan(MergeConfig(), inputs_of(untied))
    assert the_plan.format.stop_ids == [2, 35]
    assert "39, which has no token" in capsys.readouterr().err


def test_a_text_config_is_resized_too():
    config = {"vocab_size": 4, "text_config": {"vocab_size": 4, "a": 1}}
    assert finish.resize_config(config, 8) == {
        "vocab_size": 8,
        "text_config": {"vocab_size": 8, "a": 1},
    }
    wrapper = {"image_token_id": 3, "text_config": {"a": 1}, "vision_config": {"vocab_size": 2}}
    assert finish.resize_config(wrapper, 8) == {**wrapper, "text_config": {"a": 1, "vocab_size": 8}}


def test_special_ids_are_stated_wherever_the_base_states_them():
    config = {"text_config": {"eos_token_id": 1, "a": 1}, "vision_config": {"eos_token_id": 4}}
    assert finish.with_values(config, {"eos_token_id": [1, 5], "pad_token_id": 0}) == {
        "text_config": {"eos_token_id": [1, 5], "a": 1},
        "vision_config": {"eos_token_id": 4},
        "eos_token_id": [1, 5],
        "pad_token_id": 0,
    }


def test_another_vocabulary_size_in_a_nested_configuration_is_no_difference(untied):
    """It was the whole of both configurations in one line."""
    for model, rows in (("base", 38), ("chat", 40), ("cpt", 48)):
        path = untied.root / model / "config.json"
        config = json.loads(path.read_text())
        config |= {"text_config": {"vocab_size": rows, "rope_theta": 10000.0}}
        config |= {"vision_config": {"depth": 3 if model == "cpt" else 2, "width": 8}}
        path.write_text(json.dumps(config))
    found = finish.config_differences(plan(MergeConfig(), inputs_of(untied)))
    assert found == ["vision_config.depth is 3 in cpt, 2 in base, 2 in chat"]
