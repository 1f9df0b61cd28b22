"""The merge as a stage, from files to files."""

import hashlib
import json
import subprocess
import sys
import tracemalloc
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cpt_merge.checkpoint.reader import Checkpoint
from cpt_merge.core.errors import UserError
from cpt_merge.core.world import World
from cpt_merge.merge import MergeConfig, files, slices
from cpt_merge.merge.config import RuleConfig
from cpt_merge.merge.files import digest as digest_of_plan
from cpt_merge.merge.files import merge_directories
from cpt_merge.merge.plan import MergeInputs, describe_rule, plan
from cpt_merge.merge.work import Work
from cpt_merge.tracking.events import Alert
from tests.merge.conftest import (
    CPT_ROWS,
    NEW,
    draw,
    make_family,
    pieces_of,
    save_weights,
    write_config,
)

EOT, IM_START = pieces_of("cpt").index("<|eot|>"), pieces_of("cpt").index("<|im_start|>")


def inputs_of(family):
    return MergeInputs(family.cpt, family.base, family.chat, family.tokenizer)


def merge(family, out, tracker, **config):
    return merge_directories(MergeConfig(**config), inputs_of(family), out, tracker)


def load(directory):
    return {
        name: v for file in directory.glob("*.safetensors") for name, v in load_file(file).items()
    }


def digest(directory):
    files = sorted([*directory.glob("*.safetensors"), *directory.glob("*.index.json")])
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def formula(weights, name, ratio):
    """The paper's formula in torch: float32, then one rounding."""
    cpt, base, chat = (weights[model][name].float() for model in ("cpt", "base", "chat"))
    return (cpt + (chat - base) * ratio).bfloat16()


@pytest.mark.parametrize("ratio", [1.0, 0.7, -0.5])
def test_every_tensor_follows_the_formula(family, tmp_path, tracker, ratio):
    merge(family, tmp_path / "out", tracker, ratio=ratio)
    merged = load(tmp_path / "out")
    assert set(merged) == set(family.weights["cpt"])
    for name, values in merged.items():
        if "embed" not in name and "head" not in name:
            assert torch.equal(values, formula(family.weights, name, ratio)), name


@pytest.mark.parametrize("ratio", [1.0, 0.7, 0.0])
def test_rows_of_the_vocabulary_meet_by_token(family, tmp_path, tracker, ratio):
    """Invariants "rows meet by token" and "one rounding" for the embedding and the head."""
    merge(family, tmp_path / "out", tracker, ratio=ratio)
    for name in ("model.embed_tokens.weight", *([] if family.tied else ["lm_head.weight"])):
        merged = load(tmp_path / "out")[name]
        weights = {model: family.weights[model][name] for model in ("cpt", "base", "chat")}
        assert len(merged) == CPT_ROWS
        chat_rows = {token: row for row, token in enumerate(pieces_of("chat"))}
        for row, token in enumerate(pieces_of("cpt")):
            if token in ("<|eot|>", "<|im_start|>"):  # the chat model's own, at full strength
                expected = weights["chat"][chat_rows[token]]
            elif token in NEW or token.startswith("pad"):
                expected = weights["cpt"][row]
            else:
                rows = {"cpt": row, "base": row, "chat": chat_rows[token]}
                cpt, base, chat = (
                    weights[model][rows[model]].float() for model in ("cpt", "base", "chat")
                )
                expected = (cpt + (chat - base) * ratio).bfloat16()
            assert torch.equal(merged[row], expected), token
        assert torch.equal(
            merged[len(pieces_of("cpt")) :], weights["cpt"][len(pieces_of("cpt")) :]
        )  # padding


def test_new_rows_can_follow_their_constituents(untied, tmp_path, tracker):
    merge(untied, tmp_path / "out", tracker, ratio=0.5, new_rows="constituents")
    name = "lm_head.weight"
    cpt, base, chat = (untied.weights[model][name].float() for model in ("cpt", "base", "chat"))
    for piece in untied.vocabulary.new:
        vector = chat[piece.constituents].mean(0) - base[piece.constituents].mean(0)
        expected = cpt[piece.id] + 0.5 * vector
        torch.testing.assert_close(
            load(tmp_path / "out")[name][piece.id].float(), expected, rtol=0.01, atol=1e-3
        )


def test_rules(untied, tmp_path, tracker):
    rules = [
        RuleConfig(kinds=["norm", "embed"], action="skip"),
        RuleConfig(pattern="v_proj", action="replace"),
        RuleConfig(layers=(1, 1), ratio=0.25),
    ]
    merge(untied, tmp_path / "out", tracker, rules=rules)
    merged, weights = load(tmp_path / "out"), untied.weights
    layer = "model.layers.{}.self_attn.{}_proj.weight"
    assert torch.equal(merged["model.norm.weight"], weights["cpt"]["model.norm.weight"])
    assert torch.equal(merged[layer.format(1, "v")], weights["chat"][layer.format(1, "v")])
    assert torch.equal(merged[layer.format(1, "q")], formula(weights, layer.format(1, "q"), 0.25))
    assert torch.equal(merged[layer.format(0, "q")], formula(weights, layer.format(0, "q"), 1.0))
    embed = merged["model.embed_tokens.weight"]
    unchanged = [row for row in range(CPT_ROWS) if row not in (EOT, IM_START)]
    assert torch.equal(embed[unchanged], weights["cpt"]["model.embed_tokens.weight"][unchanged])
    assert torch.equal(
        embed[IM_START], weights["chat"]["model.embed_tokens.weight"][38]
    )  # also under skip


@pytest.mark.parametrize(
    "settings",
    [
        {"ratio": 0.7, "new_rows": "constituents"},
        {"method": "ties", "density": 0.4, "gate": True},
        {"method": "dare_ties", "density": 0.4, "ratio": "ramp(0.2, 1)"},
    ],
    ids=["add", "ties and a gate", "dare_ties"],
)
def test_bytes_do_not_depend_on_threads_or_chunks(untied, tmp_path, tracker, monkeypatch, settings):
    """Invariant "one rounding"."""
    second = {"base": str(untied.base), "chat": str(untied.chat), "ratio": -0.3}
    settings = {**settings, "vectors": [second]}
    merge(untied, tmp_path / "one", tracker, **settings)
    for number, (chunk, block, threads) in enumerate(
        [(64, 1000, 4), (7, 333, 3), (1 << 17, 32, 1)]
    ):
        monkeypatch.setattr(slices, "CHUNK", chunk)
        monkeypatch.setattr(files, "BLOCK", block)
        monkeypatch.setattr(files, "MAX_THREADS", threads)
        merge(untied, tmp_path / f"other{number}", tracker, **settings)
        assert digest(tmp_path / f"other{number}") == digest(tmp_path / "one")


def test_sharded_inputs_and_outputs(tmp_path, tracker):
    single, several = make_family(tmp_path / "a"), make_family(tmp_path / "b", files=3)
    merge(single, tmp_path / "one", tracker)
    merge(several, tmp_path / "many", tracker, shard_size=10e3 / 1e9)
    one, many = load(tmp_path / "one"), load(tmp_path / "many")
    assert len(list((tmp_path / "many").glob("model-0000?-of-0000?.safetensors"))) > 3
    assert all(torch.equal(one[name], many[name]) for name in one)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_output_types(untied, tmp_path, tracker, dtype):
    merge(untied, tmp_path / "out", tracker, dtype=dtype)
    name = "model.layers.0.mlp.up_proj.weight"
    cpt, base, chat = (untied.weights[model][name].float() for model in ("cpt", "base", "chat"))
    assert torch.equal(
        load(tmp_path / "out")[name], (cpt + (chat - base)).to(getattr(torch, dtype))
    )
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == dtype


def test_the_base_s_type_decides_where_none_is_given(untied, tmp_path, tracker):
    save_weights({name: v.float() for name, v in untied.weights["cpt"].items()}, untied.cpt)
    save_weights({name: v.half() for name, v in untied.weights["chat"].items()}, untied.chat)
    merge(untied, tmp_path / "out", tracker)
    assert {values.dtype for values in load(tmp_path / "out").values()} == {torch.bfloat16}


def test_masks_are_copied(untied, tmp_path, tracker):
    for model in ("cpt", "base", "chat"):
        save_weights(
            {**untied.weights[model], "model.mask": torch.tensor([1, 2, 3])}, untied.root / model
        )
    merge(untied, tmp_path / "out", tracker)
    assert load(tmp_path / "out")["model.mask"].tolist() == [1, 2, 3]


def test_a_bias_of_the_head_is_aligned_by_token(untied, tmp_path, tracker):
    bias = {
        model: torch.arange(float(rows)) * 2
        for model, rows in (("cpt", 48), ("base", 38), ("chat", 40))
    }
    bias["chat"] += 1
    for model, values in bias.items():
        save_weights(
            {**untied.weights[model], "lm_head.bias": values.bfloat16()}, untied.root / model
        )
    merge(untied, tmp_path / "out", tracker, ratio=0.5, new_rows="constituents")
    merged = load(tmp_path / "out")["lm_head.bias"]
    assert merged[3] == 2 * 3 + 0.5
    assert merged[IM_START] == 2 * 38 + 1
    assert merged[39] == 2 * 39 + 0.5  # a new piece


def test_the_result_is_a_chat_model(family, tmp_path, tracker):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    merge(family, tmp_path / "out", tracker)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    assert (
        model.get_output_embeddings().weight is model.get_input_embeddings().weight
    ) == family.tied
    merged = load(tmp_path / "out")["model.embed_tokens.weight"]
    assert torch.equal(model.get_input_embeddings().weight, merged)
    assert sorted(model.generation_config.eos_token_id) == [2, EOT]
    assert (
        model.generation_config.pad_token_id == IM_START
    )  # chat's id 38, where CPT has another token
    assert model.generation_config.temperature == 0.6
    assert tokenizer.eos_token == "<|eot|>"
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "the ing"}], return_dict=False)
    assert ids == [IM_START, *tokenizer("the ing")["input_ids"], EOT]
    assert tokenizer.convert_tokens_to_ids("ing") == 38


def test_report_card_figure_and_tracker(untied, tmp_path, tracker, recording):
    (untied.base / "README.md").write_text("---\nlicense: llama3\nlicense_name: x\n---\ntext")
    (untied.chat / "README.md").write_text("---\nlicense: llama3\n---\n")
    write_config(untied.chat, 40, False, rope_theta=5e5)
    results = merge(untied, tmp_path / "out", tracker, ratio=0.7)
    assert results["rows"] == {"padding": 6, "shared": 35, "new": 5, "chat": 2, "unmatched": 0}
    json.dumps(results)
    report = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    base, chat = (
        untied.weights[model]["model.layers.1.mlp.up_proj.weight"].float()
        for model in ("base", "chat")
    )
    entry = report["tensors"]["model.layers.1.mlp.up_proj.weight"]
    assert entry["vector"] == pytest.approx(float((chat - base).norm() / base.norm()), rel=1e-4)
    assert any("rope_theta is 10000.0 in cpt" in line for line in report["config_differences"])
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: llama3" in card
    assert "cpt + 0.7 * (chat - base)" in card
    figure = ElementTree.parse(tmp_path / "out" / "merge_norms.svg")
    words = "".join(figure.getroot().itertext())
    assert "chat vector: |chat - base| / |base|" in words
    assert "CPT's change: |cpt - base| / |base|" in words
    shown = recording.tables
    assert recording.names == {
        "merge/layers", "merge/length by layer", "merge/cosine by layer",
        "merge/rules", "merge/rows",
        "merge_report.json",
    }  # fmt: skip
    assert [row["layer"] for row in shown["merge/length by layer"]] == [0, 1, 0, 1]
    assert {"kind": "attention", "rule": "+0.7 chat vector", "tensors": 8} in shown[
        "merge/rules"
    ], shown["merge/rules"]
    assert {"role": "new", "rows": 5} in shown["merge/rows"]
    assert [row["part"] for row in shown["merge/layers"]] == [
        "embed",
        "0",
        "1",
        "norm",
        "head",
    ]


def test_without_tokenizers_equal_rows_are_taken_as_equal(tmp_path, tracker, capsys):
    family = make_family(tmp_path / "models")
    for model in ("base", "chat", "cpt"):
        weights = {name: values[:CPT_ROWS] for name, values in family.weights["cpt"].items()}
        save_weights(weights, family.root / model)
        write_config(family.root / model, CPT_ROWS, False)
    for model in ("base", "chat", "cpt", "tokenizer"):
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (family.root / model / name).unlink()
    results = merge(family, tmp_path / "out", tracker)
    assert results["rows"]["shared"] == CPT_ROWS
    assert "treated as the same tokens" in capsys.readouterr().err


# --- ancestry ---


def test_a_cpt_model_that_holds_the_vector_already_is_warned_about(
    untied, tmp_path, tracker, recording, capsys
):
    chat, change = (
        untied.weights["chat"],
        draw({n: tuple(v.shape) for n, v in untied.weights["base"].items()}, 0.01, 9),
    )
    cpt = {name: values.clone() for name, values in untied.weights["cpt"].items()}
    for name in cpt:
        if "layers" in name:
            cpt[name] = (chat[name].float() + change[name]).bfloat16()
    save_weights(cpt, untied.cpt)
    results = merge(untied, tmp_path / "out", tracker)
    assert any("would get the vector twice" in warning for warning in results["warnings"])
    assert "WARNING" in capsys.readouterr().err
    assert any(isinstance(event, Alert) for event in recording.events)


def test_a_cpt_model_whose_vocabulary_and_norms_moved_along_the_vector_is_not(
    untied, tmp_path, tracker
):
    weights = untied.weights
    cpt = {name: values.clone() for name, values in weights["cpt"].items()}
    for name in cpt:
        if "layers" not in name or "norm" in name:
            rows = len(weights["base"][name])
            vector = weights["chat"][name][:rows].float() - weights["base"][name].float()
            cpt[name][:rows] = (weights["base"][name].float() + 2 * vector).bfloat16()
    save_weights(cpt, untied.cpt)
    assert merge(untied, tmp_path / "out", tracker)["warnings"] == []


def test_a_base_of_another_family_is_warned_about(untied, tmp_path, tracker):
    stranger = draw({name: tuple(v.shape) for name, v in untied.weights["base"].items()}, 0.2, 77)
    save_weights({name: values.bfloat16() for name, values in stranger.items()}, untied.base)
    warnings = merge(untied, tmp_path / "out", tracker)["warnings"]
    assert any("not chat's ancestor" in warning for warning in warnings)


def test_chat_that_equals_base_is_warned_about(untied, tmp_path, tracker):
    weights = {name: values.clone() for name, values in untied.weights["chat"].items()}
    for name, values in untied.weights["base"].items():
        weights[name][: len(values)] = values
    save_weights(weights, untied.chat)
    assert any(
        "no vector" in warning for warning in merge(untied, tmp_path / "out", tracker)["warnings"]
    )


# --- what is refused ---


def refused(family, tmp_path, tracker, *words, **config):
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(UserError) as caught:
        merge(family, tmp_path / "out", tracker, **config)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message
    assert (
        sorted(path.name for path in tmp_path.iterdir()) == before
    )  # nothing half-written is left


def test_all_problems_come_in_one_list(untied, tmp_path, tracker):
    weights = dict(untied.weights["chat"])
    weights["model.layers.0.mlp.up_proj.weight"] = torch.zeros(3, 4)
    weights["model.extra.weight"] = weights.pop("model.layers.1.mlp.up_proj.weight")
    save_weights(weights, untied.chat)
    write_config(untied.chat, 40, False, model_type="mistral")
    refused(untied, tmp_path, tracker, "mistral in chat",
    "layers.1.mlp.up_proj.weight is missing in chat",
            "model.extra.weight is missing in cpt and base", "(3, 4) in chat")  # fmt: skip


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("model", ["cpt", "base", "chat"])
def test_nan_and_inf_are_named_with_their_tensor(untied, tmp_path, tracker, model, bad):
    weights = {name: values.clone() for name, values in untied.weights[model].items()}
    weights["model.layers.1.mlp.up_proj.weight"][5, 7] = bad
    save_weights(weights, untied.root / model)
    refused(untied, tmp_path, tracker, f"model.layers.1.mlp.up_proj.weight of the {model} model")


@pytest.mark.parametrize("method", ["ties", "dare", "dare_ties"])
def test_a_method_that_thins_the_vector_does_not_hide_nan(untied, tmp_path, tracker, method):
    weights = {name: values.clone() for name, values in untied.weights["chat"].items()}
    weights["model.layers.1.mlp.up_proj.weight"][5, 7] = float("nan")
    save_weights(weights, untied.chat)
    refused(
        untied, tmp_path, tracker, "up_proj.weight of the chat model", method=method, density=0.01
    )


def test_nan_in_a_tower_that_only_cpt_has_is_named(untied, tmp_path, tracker):
    weights = {
        **untied.weights["cpt"],
        "vision_tower.encoder.weight": torch.full((4, 4), torch.nan),
    }
    save_weights(weights, untied.cpt)
    refused(untied, tmp_path, tracker, "vision_tower.encoder.weight of the cpt model holds NaN")


def test_nan_in_a_kept_row_is_named(untied, tmp_path, tracker):
    weights = {name: values.clone() for name, values in untied.weights["cpt"].items()}
    weights["lm_head.weight"][39, 0] = float("nan")
    save_weights(weights, untied.cpt)
    refused(untied, tmp_path, tracker, "lm_head.weight")


def test_an_overflow_of_float16_is_named(untied, tmp_path, tracker):
    weights = {name: values.clone() for name, values in untied.weights["cpt"].items()}
    weights["model.norm.weight"][0] = 1e6
    save_weights(weights, untied.cpt)
    refused(untied, tmp_path, tracker, "model.norm.weight", "float16", dtype="float16")


def test_an_eight_bit_type_is_refused(untied, tmp_path, tracker):
    weights = dict(untied.weights["cpt"])
    weights["model.norm.weight"] = weights["model.norm.weight"].to(torch.float8_e4m3fn)
    save_weights(weights, untied.cpt)
    refused(untied, tmp_path, tracker, "model.norm.weight", "F8_E4M3")


def test_rows_without_tokenizer_must_be_equally_many(untied, tmp_path, tracker):
    (untied.chat / "tokenizer.json").unlink()
    refused(untied, tmp_path, tracker, f"no tokenizer.json or tokenizer.model in {untied.chat}")
    for directory in (untied.base, untied.tokenizer):
        (directory / "tokenizer.json").unlink()
    for directory in (untied.base, untied.chat, untied.tokenizer):
        (directory / "tokenizer_config.json").unlink()
    refused(untied, tmp_path, tracker, "48 (cpt), 38 (base) and 40 (chat)", "tokenizer")


def test_a_directory_in_use_is_refused(untied, tmp_path, tracker):
    with pytest.raises(UserError, match="is the chat model itself"):
        merge_directories(MergeConfig(), inputs_of(untied), untied.chat, tracker)
    assert Checkpoint.open(untied.chat)
    with pytest.raises(UserError, match="not empty"):
        merge_directories(MergeConfig(), inputs_of(untied), untied.tokenizer, tracker)


def test_a_rule_that_matches_nothing_is_refused(untied, tmp_path, tracker):
    refused(
        untied, tmp_path, tracker, "merge.rules.0", rules=[RuleConfig(pattern="q_porj", ratio=0.5)]
    )


# --- what it costs ---


def test_memory_does_not_grow_with_the_model(untied, tmp_path, monkeypatch):
    """Invariant "flat memory"."""
    monkeypatch.setattr(files, "MAX_THREADS", 1)
    peaks = []
    for rows in (2_000, 8_000, 32_000):
        for model in ("cpt", "base", "chat"):
            wide = {"model.layers.0.mlp.wide.weight": torch.full((rows, 64), 0.5).bfloat16()}
            save_weights({**untied.weights[model], **wide}, untied.root / model)
        the_plan = plan(MergeConfig(), inputs_of(untied))
        work = Work(tmp_path / f"out{rows}", the_plan.layout(), digest_of_plan(the_plan), World())
        work.open()
        tracemalloc.start()
        files.merge_files(the_plan, work)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        work.abandon("", useless=True)
    assert peaks[2] < 1.1 * peaks[1]
    assert peaks[2] < 8e6


def test_the_file_merge_needs_no_torch():
    code = (
        "import sys, cpt_merge.merge.files, cpt_merge.merge.extract\n"
        "print(sorted({'torch', 'transformers', 'matplotlib', 'tokenizers'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_the_plan_reads_no_weights(untied, monkeypatch):
    monkeypatch.setattr(
        Checkpoint, "read_flat", lambda *arguments: pytest.fail("weights were read")
    )
    config = MergeConfig(ratio=0.7, rules=[RuleConfig(kinds=["norm"], action="skip")])
    the_plan = plan(config, inputs_of(untied))
    rules = {tensor.name: describe_rule(the_plan, tensor) for tensor in the_plan.tensors}
    assert rules["model.norm.weight"] == "keep"
    assert rules["model.embed_tokens.weight"] == "+0.7 chat vector"
    assert int(np.sum(the_plan.chat.rows.role >= 0)) == CPT_ROWS
