"""Several vectors, extracted vectors, methods: by the stage, against plain torch arithmetic."""

import json

import pytest
import torch

from cpt_merge.core.errors import UserError
from cpt_merge.merge import MergeConfig
from cpt_merge.merge.extract import extract
from cpt_merge.merge.files import merge_directories
from cpt_merge.merge.plan import MergeInputs, plan
from tests.merge.conftest import (
    CHAT_ROWS,
    CPT_ROWS,
    bfloat16,
    draw,
    pieces_of,
    save_weights,
    shapes,
    write_config,
    write_tokenizer,
)  # fmt: skip
from tests.merge.test_merge_files import EOT, IM_START, digest, inputs_of, load, merge
from tests.merge.test_rows import add, edit_tokenizer

BODY = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def second(untied):
    """A second chat model of the same base, in `other`."""
    weights = draw(shapes(CHAT_ROWS, False), 0.03, 17)
    for name, values in untied.weights["base"].items():
        weights[name][: len(values)] += values.float()
    untied.weights["other"] = bfloat16(weights)
    write_tokenizer(untied.root / "other", "chat")
    save_weights(untied.weights["other"], untied.root / "other")
    write_config(untied.root / "other", CHAT_ROWS, False)
    return untied


def pair(family, chat="other", **more):
    return {"base": str(family.base), "chat": str(family.root / chat), **more}


def difference(family, name, chat="chat"):
    base = family.weights["base"][name].float()
    return family.weights[chat][name][: len(base)].float() - base


def test_vectors_are_added_one_after_the_other_and_rounded_once(second, tmp_path, tracker):
    merge(second, tmp_path / "out", tracker, ratio=0.7, vectors=[pair(second, ratio=-0.3)])
    expected = second.weights["cpt"][BODY].float() + difference(second, BODY) * 0.7
    expected = (expected + difference(second, BODY, "other") * -0.3).bfloat16()
    assert torch.equal(load(tmp_path / "out")[BODY], expected)


def test_the_chat_format_is_the_first_vector_s(second, tmp_path, tracker):
    merge(second, tmp_path / "out", tracker, ratio=0.7, vectors=[pair(second)])
    head = load(tmp_path / "out")["lm_head.weight"]
    for row in (EOT, IM_START):
        assert torch.equal(
            head[row],
            second.weights["chat"]["lm_head.weight"][
                pieces_of("chat").index(pieces_of("cpt")[row])
            ],
        )
    the = pieces_of("cpt").index("the")
    summed = (
        second.weights["cpt"]["lm_head.weight"][the].float()
        + difference(second, "lm_head.weight")[the] * 0.7
    )
    summed = (summed + difference(second, "lm_head.weight", "other")[the]).bfloat16()
    assert torch.equal(head[the], summed)


def test_a_vector_has_rules_of_its_own(second, tmp_path, tracker):
    rules = [{"kinds": ["mlp"], "action": "skip"}, {"layers": [0, 0], "ratio": 0.25}]
    merge(second, tmp_path / "out", tracker, vectors=[pair(second, rules=rules)])
    merged = load(tmp_path / "out")
    assert torch.equal(
        merged[BODY], (second.weights["cpt"][BODY].float() + difference(second, BODY)).bfloat16()
    )
    name = "model.layers.0.self_attn.q_proj.weight"
    expected = second.weights["cpt"][name].float() + difference(second, name)
    assert torch.equal(
        merged[name], (expected + difference(second, name, "other") * 0.25).bfloat16()
    )


def test_taking_the_vector_away_again_is_forgetting(untied, tmp_path, tracker):
    merge(untied, tmp_path / "there", tracker, dtype="float32")
    for file in ("vocabulary_map.json",):
        (untied.tokenizer / file).unlink()
    inputs = MergeInputs(tmp_path / "there", untied.base, untied.chat, untied.tokenizer)
    merge_directories(MergeConfig(ratio=-1.0, dtype="float32"), inputs, tmp_path / "back", tracker)
    torch.testing.assert_close(
        load(tmp_path / "back")[BODY], untied.weights["cpt"][BODY].float(), rtol=0, atol=1e-6
    )


def test_special_tokens_of_a_further_vector_are_said_not_needed(second, tmp_path, tracker, capsys):
    edit_tokenizer(second.root / "other", lambda content: add(content, "<|extra|>", 39))
    merge(second, tmp_path / "out", tracker, vectors=[pair(second)])
    assert "<|extra|>" in capsys.readouterr().err
    assert len(load(tmp_path / "out")["lm_head.weight"]) == CPT_ROWS


# --- methods ---


def test_ties_of_one_vector_trims_it(untied, tmp_path, tracker):
    merge(untied, tmp_path / "out", tracker, ratio=0.5, method="ties", density=0.25)
    d = difference(untied, BODY)
    threshold = d.abs().flatten().sort(descending=True).values[int(0.25 * d.numel()) - 1]
    trimmed = torch.where(d.abs() >= threshold, d, 0)
    assert torch.equal(
        load(tmp_path / "out")[BODY],
        (untied.weights["cpt"][BODY].float() + trimmed * 0.5).bfloat16(),
    )
    assert (trimmed != 0).float().mean() == pytest.approx(0.25, abs=0.02)


def test_ties_of_two_vectors_elects_signs(second, tmp_path, tracker):
    merge(
        second,
        tmp_path / "out",
        tracker,
        method="ties",
        density=1.0,
        vectors=[pair(second)],
        dtype="float32",
    )
    a, b = difference(second, BODY), difference(second, BODY, "other")
    both = torch.stack([a, b])
    agrees = torch.where(a + b >= 0, both > 0, both < 0)
    expected = second.weights["cpt"][BODY].float() + (both * agrees).sum(0) / agrees.sum(0).clamp(
        min=1
    )
    torch.testing.assert_close(load(tmp_path / "out")[BODY], expected, rtol=0, atol=1e-7)


def test_dare_keeps_a_share_and_enlarges_it(untied, tmp_path, tracker):
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        merge(
            untied, tmp_path / out, tracker, method="dare", density=0.5, seed=seed, dtype="float32"
        )
    assert digest(tmp_path / "a") == digest(tmp_path / "b") != digest(tmp_path / "c")
    change = load(tmp_path / "a")[BODY] - untied.weights["cpt"][BODY].float()
    kept, d = change != 0, difference(untied, BODY)
    assert kept.float().mean() == pytest.approx(0.5, abs=0.05)
    torch.testing.assert_close(change[kept], (d / 0.5)[kept], rtol=1e-3, atol=1e-6)


def test_the_gate_lowers_the_vector_where_cpt_moved(untied, tmp_path, tracker):
    merge(
        untied,
        tmp_path / "out",
        tracker,
        gate=True,
        dtype="float32",
        rules=[{"kinds": ["norm"], "gate": False}],
    )
    cpt, base, d = (
        untied.weights["cpt"][BODY].float(),
        untied.weights["base"][BODY].float(),
        difference(untied, BODY),
    )
    m = (cpt - base).abs()
    m = (m - m.min()) / (m.max() - m.min())
    expected = cpt + d * (1 - torch.sigmoid(12 * m - 6))
    torch.testing.assert_close(load(tmp_path / "out")[BODY], expected, rtol=0, atol=1e-6)
    norm = "model.norm.weight"
    assert torch.equal(
        load(tmp_path / "out")[norm], untied.weights["cpt"][norm].float() + difference(untied, norm)
    )


# --- extracted vectors ---


@pytest.fixture
def vector(family, tmp_path):
    extract(family.base, family.chat, tmp_path / "vector")
    return tmp_path / "vector"


def with_vector(family, vector, base=None):
    return MergeInputs(family.cpt, base, None, family.tokenizer, vector)


@pytest.mark.parametrize("settings", [
    {"ratio": 0.7, "new_rows": "constituents"}, {"method": "ties", "density": 0.3},
    {"method": "dare", "density": 0.3},
], ids=["add", "ties", "dare"])  # fmt: skip
def test_a_vector_gives_the_same_bytes_as_the_pair(family, vector, tmp_path, tracker, settings):
    merge(family, tmp_path / "pair", tracker, **settings)
    merge_directories(
        MergeConfig(**settings), with_vector(family, vector), tmp_path / "out", tracker
    )
    assert digest(tmp_path / "out") == digest(tmp_path / "pair")
    for file in ("config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "pair" / file).read_bytes(), (
            file
        )


def test_a_vector_can_be_sent_elsewhere(family, vector, tmp_path, tracker):
    """Nothing of base or chat is needed any more."""
    merge(family, tmp_path / "pair", tracker)
    inputs = with_vector(family, vector.rename(tmp_path / "moved"))
    for model in ("base", "chat"):
        (family.root / model).rename(family.root / f"{model}-gone")
    results = merge_directories(MergeConfig(), inputs, tmp_path / "out", tracker)
    assert digest(tmp_path / "out") == digest(tmp_path / "pair")
    assert results["overall"]["vector"] == pytest.approx(
        0.1, abs=0.02
    )  # in proportion to the base, from vector.json
    assert "change" not in results["overall"]


def test_with_its_base_a_vector_can_be_gated_and_compared(family, vector, tmp_path, tracker):
    merge_directories(
        MergeConfig(gate=True), with_vector(family, vector, family.base), tmp_path / "out", tracker
    )
    merge(family, tmp_path / "pair", tracker, gate=True)
    assert digest(tmp_path / "out") == digest(tmp_path / "pair")


def test_a_vector_with_another_base_is_refused(untied, tmp_path, tracker):
    extract(untied.base, untied.chat, tmp_path / "vector")
    weights = {name: values.clone() for name, values in untied.weights["base"].items()}
    weights[BODY][0, 0] += 1
    save_weights(weights, untied.base)
    with pytest.raises(UserError, match="is not the base"):
        merge_directories(
            MergeConfig(gate=True),
            with_vector(untied, tmp_path / "vector", untied.base),
            tmp_path / "out",
            tracker,
        )


def test_what_a_vector_cannot_do_is_refused_in_one_list(family, vector):
    config = MergeConfig(gate=True, rules=[{"kinds": ["norm"], "action": "replace"}])
    with pytest.raises(UserError, match=r"replaces by the chat model.*give the base together"):
        plan(config, with_vector(family, vector))


def test_a_vector_is_no_model(vector):
    from transformers import AutoModelForCausalLM

    with pytest.raises(OSError, match=r"model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(vector)


def test_a_smaller_vector(untied, tmp_path, tracker):
    extract(untied.base, untied.chat, tmp_path / "vector", "bfloat16", shard_bytes=8_000)
    assert len(list((tmp_path / "vector").glob("vector-*.safetensors"))) > 2
    merge_directories(
        MergeConfig(), with_vector(untied, tmp_path / "vector"), tmp_path / "out", tracker
    )
    expected = untied.weights["cpt"][BODY].float() + difference(untied, BODY).bfloat16().float()
    assert torch.equal(load(tmp_path / "out")[BODY], expected.bfloat16())


def test_a_directory_without_a_vector_is_refused(untied, tmp_path, tracker):
    with pytest.raises(UserError, match="extract-vector"):
        merge_directories(
            MergeConfig(), with_vector(untied, untied.chat), tmp_path / "out", tracker
        )


def test_the_card_of_a_vector_carries_licences(untied, tmp_path):
    (untied.chat / "README.md").write_text("---\nlicense: llama3\n---\n")
    extract(untied.base, untied.chat, tmp_path / "vector")
    assert "license: llama3" in (tmp_path / "vector" / "README.md").read_text()
    assert json.loads((tmp_path / "vector" / "vector.json").read_text())["dtype"] == "float32"


def test_inputs_of_both_kinds_are_told_apart(untied):
    with pytest.raises(UserError, match="both a base and a chat model"):
        plan(MergeConfig(), MergeInputs(untied.cpt, untied.base, None, untied.tokenizer))
    assert plan(MergeConfig(), inputs_of(untied)).chat.label == "chat vector"
