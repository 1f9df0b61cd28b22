import pytest
from pydantic import ValidationError

from cpt_merge.checkpoint.tensor_kinds import kind_of, layer_of
from cpt_merge.merge.config import MergeConfig, RuleConfig
from cpt_merge.merge.rules import Treatment, rule_problems, treatment_of


@pytest.mark.parametrize(
    ("name", "kind", "layer"),
    [
        ("model.embed_tokens.weight", "embed", None),
        ("lm_head.weight", "head", None),
        ("model.norm.weight", "norm", None),
        ("model.layers.11.input_layernorm.weight", "norm", 11),
        ("model.layers.3.post_attention_layernorm.weight", "norm", 3),
        ("model.layers.3.self_attn.q_norm.weight", "norm", 3),  # Qwen 3
        ("model.layers.3.pre_feedforward_layernorm.weight", "norm", 3),  # Gemma 2
        ("model.layers.0.self_attn.q_proj.bias", "attention", 0),  # Qwen 2
        ("model.layers.0.mlp.experts.7.up_proj.weight", "experts", 0),
        ("model.language_model.layers.2.mlp.down_proj.weight", "mlp", 2),
        ("transformer.wte.weight", "embed", None),
        ("transformer.h.4.ln_1.weight", "norm", 4),
        ("transformer.wpe.weight", "other", None),
    ],
)
def test_kind_and_layer_by_name(name, kind, layer):
    assert (kind_of(name), layer_of(name)) == (kind, layer)


def test_the_first_matching_rule_decides():
    config = MergeConfig(
        ratio=0.5,
        rules=[
            RuleConfig(kinds=["norm"], action="skip"),
            RuleConfig(layers=(0, 1), ratio=0.1),
            RuleConfig(pattern=r"q_proj", action="replace"),
        ],
    )
    assert treatment_of("model.layers.0.input_layernorm.weight", config, 4).action == "skip"
    assert treatment_of("model.layers.1.self_attn.q_proj.weight", config, 4) == Treatment(
        "add", (0.1,)
    )
    assert treatment_of("model.layers.2.self_attn.q_proj.weight", config, 4).action == "replace"
    assert treatment_of("model.layers.2.self_attn.k_proj.weight", config, 4) == Treatment(
        "add", (0.5,)
    )
    assert treatment_of("model.embed_tokens.weight", config, 4) == Treatment("add", (0.5,))


def test_a_rule_without_effect_is_an_error():
    rules = [
        RuleConfig(kinds=["head"]),
        RuleConfig(layers=(40, 50)),
        RuleConfig(pattern="head", action="skip"),
    ]
    nothing, hidden = rule_problems(["lm_head.weight"], MergeConfig(rules=rules))
    assert nothing.startswith("merge.rules.1")
    assert "matches no tensor" in nothing
    assert hidden.startswith("merge.rules.2")
    assert "because earlier rules do" in hidden


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"kinds": ["head"], "action": "skip", "ratio": 0.5},
        {"layers": [3, 2]},
        {"pattern": "("},
        {"kinds": ["heads"]},
    ],
)
def test_rules_that_make_no_sense(values):
    with pytest.raises(ValidationError):
        RuleConfig(**values)
