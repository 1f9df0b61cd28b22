import pytest
from pydantic import ValidationError

from cpt_merge.merge import MergeConfig
from cpt_merge.merge.expressions import evaluate
from cpt_merge.merge.rules import treatment_of


@pytest.mark.parametrize(
    ("ratio", "layer", "value"),
    [
        (0.7, 3, 0.7),
        ("0.7", 3, 0.7),
        ("ramp(0.2, 1)", 0, 0.2),
        ("ramp(0.2, 1)", 9, 1.0),
        ("1 - 0.5 * depth", 9, 0.5),
        ("max(0.2, 1 - layer / 4)", 5, 0.2),
        ("-(layer + 1) / layers", 4, -0.5),
        ("min(1, 2) * abs(-3)", 0, 3.0),
    ],
)
def test_a_ratio_of_the_layer(ratio, layer, value):
    assert evaluate(ratio, layer, 10) == pytest.approx(value)


@pytest.mark.parametrize(
    ("ratio", "word"),
    [
        ("__import__('os')", "not known"), ("layer.real", "not known"), ("2 ** 9", "not known"),
        ("ramp(1)", "not known"),
        ("1 / layer", "divides by zero"), ("0.5 0.7", "not an arithmetic"), ("",
         "not an arithmetic"), ("'a'", "not known"),
        ("True", "not known"), ("1e400", "inf"), ("min()", "cannot be evaluated"),
        ("(" * 500 + ")" * 500, "cannot be evaluated|not an arithmetic"),
    ],
)  # fmt: skip
def test_what_is_no_ratio_is_refused(ratio, word):
    with pytest.raises(ValidationError, match=word):
        MergeConfig(ratio=ratio)


def test_what_lies_outside_the_layers_counts_as_the_first_or_the_last():
    config = MergeConfig(ratio="ramp(0.25, 1)", rules=[{"kinds": ["mlp"], "ratio": "layer"}])
    names = [
        "model.embed_tokens.weight",
        "model.layers.2.mlp.up_proj.weight",
        "model.norm.weight",
        "lm_head.weight",
    ]
    assert [treatment_of(name, config, 4).ratios for name in names] == [
        (0.25,),
        (2.0,),
        (1.0,),
        (1.0,),
    ]
