"""Ways from CPT to the chat model without a base, against independent numpy formulas."""

import json

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from cpt_merge.core.distributed import Ranks
from cpt_merge.core.errors import UserError
from cpt_merge.merge import MergeConfig
from cpt_merge.merge.files import merge_directories
from cpt_merge.merge.methods.slerp import Products, factors
from cpt_merge.merge.plan import MergeInputs
from tests.command_line import cpt_merge
from tests.merge.conftest import NEW, make_family, pieces_of
from tests.merge.test_merge_files import digest, load
from tests.merge.test_merge_hook import masters, merge_in_memory, shards_of

EMBED, HEAD, BODY = (
    "model.embed_tokens.weight",
    "lm_head.weight",
    "model.layers.1.mlp.up_proj.weight",
)


def without_base(family):
    return MergeInputs(family.cpt, None, family.chat, family.tokenizer)


def merged(family, out, tracker, **config):
    merge_directories(MergeConfig(**config), without_base(family), out, tracker)
    return load(out)


def numbers(family, model, name):
    return family.weights[model][name].float().numpy()


def rows_of(token):
    return pieces_of("cpt").index(token), pieces_of("chat").index(token)


def bf16(values):
    return torch.from_numpy(np.asarray(values, np.float32)).bfloat16()


@pytest.mark.parametrize("ratio", [0.0, 0.3, 1.0])
def test_the_line_from_cpt_to_chat(family, tmp_path, tracker, ratio):
    found = merged(family, tmp_path / "out", tracker, method="interpolate", ratio=ratio)
    for name in family.weights["cpt"]:
        cpt, chat = numbers(family, "cpt", name), numbers(family, "chat", name)
        if "embed" not in name and "head" not in name:
            assert torch.equal(found[name], bf16(cpt + (chat - cpt) * np.float32(ratio))), name
            continue
        for token in ("the", "a"):
            here, there = rows_of(token)
            expected = cpt[here] + (chat[there] - cpt[here]) * np.float32(ratio)
            assert torch.equal(found[name][here], bf16(expected)), token
        for token in ("<|im_start|>", "<|eot|>"):  # the chat format's, whatever the ratio
            here, there = rows_of(token)
            assert torch.equal(found[name][here], family.weights["chat"][name][there]), token
        for token in NEW:
            row = pieces_of("cpt").index(token)
            assert torch.equal(found[name][row], family.weights["cpt"][name][row]), token


def test_shares_by_layer_and_kind(untied, tmp_path, tracker):
    rules = [{"kinds": ["attention"], "ratio": 0.25}, {"kinds": ["head"], "action": "skip"}]
    found = merged(
        untied, tmp_path / "out", tracker, method="interpolate", ratio="ramp(0, 1)", rules=rules
    )
    assert torch.equal(found[BODY], untied.weights["chat"][BODY])
    first = BODY.replace("layers.1", "layers.0")
    assert torch.equal(found[first], untied.weights["cpt"][first])
    name = "model.layers.0.self_attn.q_proj.weight"
    cpt, chat = numbers(untied, "cpt", name), numbers(untied, "chat", name)
    assert torch.equal(found[name], bf16(cpt + (chat - cpt) * np.float32(0.25)))
    the, _ = rows_of("the")
    assert torch.equal(found[HEAD][the], untied.weights["cpt"][HEAD][the])


def arc(cpt, chat, ratio):
    """Shoemake's formula in double precision."""
    cpt, chat = cpt.astype(np.float64), chat.astype(np.float64)
    angle = np.arccos((cpt * chat).sum() / np.linalg.norm(cpt) / np.linalg.norm(chat))
    return (np.sin((1 - ratio) * angle) * cpt + np.sin(ratio * angle) * chat) / np.sin(angle)


def test_slerp_follows_the_arc_of_each_tensor(untied, tmp_path, tracker):
    found = merged(untied, tmp_path / "out", tracker, method="slerp", ratio=0.4)
    for name in untied.weights["cpt"]:
        cpt, chat = numbers(untied, "cpt", name), numbers(untied, "chat", name)
        if "embed" in name or "head" in name:
            shared = [t for t in pieces_of("base") if t in pieces_of("chat") and t != "<|eot|>"]
            pairs = np.array([rows_of(token) for token in shared])
            expected = arc(cpt[pairs[:, 0]], chat[pairs[:, 1]], 0.4)
            values = found[name][pairs[:, 0]].float().numpy()
        else:
            expected, values = arc(cpt, chat, 0.4), found[name].float().numpy()
        np.testing.assert_allclose(values, expected, rtol=2**-8, atol=1e-6, err_msg=name)


def test_slerp_of_parallel_and_empty_tensors_is_a_line():
    assert factors(0.3, Products(4.0, 9.0, 6.0)) == (0.7, 0.3)
    assert factors(0.3, Products()) == (0.7, 0.3)
    assert factors(0.0, Products(4.0, 9.0, 1.0)) == pytest.approx((1.0, 0.0))
    assert factors(1.0, Products(4.0, 9.0, 1.0)) == pytest.approx((0.0, 1.0))


@pytest.mark.parametrize("method", ["interpolate", "slerp"])
def test_a_base_changes_nothing_and_the_report_says_what_was_done(
    untied, tmp_path, tracker, method
):
    merged(untied, tmp_path / "without", tracker, method=method, ratio=0.5)
    inputs = MergeInputs(untied.cpt, untied.base, untied.chat, untied.tokenizer)
    merge_directories(MergeConfig(method=method, ratio=0.5), inputs, tmp_path / "with", tracker)
    assert digest(tmp_path / "with") == digest(tmp_path / "without")
    assert "0.5 * (chat - cpt)" in (tmp_path / "without" / "README.md").read_text()
    report = json.loads((tmp_path / "without" / "merge_report.json").read_text())
    assert report["tensors"][BODY]["rule"] == f"{method} 0.5 to chat"
    assert report["rows"]["new"] == len(NEW)
    assert "base" not in report["inputs"]


def test_the_hook_gives_the_same_bytes_and_refuses_slerp(untied, tmp_path, tracker):
    shards = shards_of(masters(untied), 0, 1)
    config = MergeConfig(method="interpolate", ratio=0.5)
    merge_in_memory(untied, config, shards, Ranks(), tmp_path / "hook")
    merged(untied, tmp_path / "files", tracker, method="interpolate", ratio=0.5)
    assert digest(tmp_path / "hook") == digest(tmp_path / "files")
    with pytest.raises(UserError, match="post_train_merge to false"):
        merge_in_memory(
            untied, MergeConfig(method="slerp", ratio=0.5), shards, Ranks(), tmp_path / "no"
        )


def test_a_model_trained_from_the_chat_model_itself(tmp_path, tracker):
    """ElChat: the chat model is trained on text, and led back to itself."""
    family = make_family(tmp_path / "models")
    found = merged(family, tmp_path / "out", tracker, method="interpolate", ratio=0.5)
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert config["eos_token"] == "<|eot|>"
    assert (tmp_path / "out" / "chat_template.jinja").is_file()
    assert len(found[EMBED]) == len(family.weights["cpt"][EMBED])


@pytest.mark.parametrize(
    "values",
    [
        {"method": "interpolate"},
        {"method": "slerp", "ratio": 0.5, "gate": True},
        {"method": "interpolate", "ratio": 0.5, "density": 0.5},
        {"method": "interpolate", "ratio": 0.5, "new_rows": "constituents"},
        {"method": "interpolate", "ratio": 0.5, "vectors": [{"chat": "a", "base": "b"}]},
    ],
)
def test_settings_that_make_no_sense(values):
    with pytest.raises(ValidationError):
        MergeConfig(**values)


def test_a_share_beyond_one_is_refused(untied, tmp_path, tracker):
    with pytest.raises(UserError, match="interpolate takes the chat model's share, from 0 to 1"):
        merged(untied, tmp_path / "out", tracker, method="interpolate", ratio=1.5)


def test_the_command_needs_no_base(untied, tmp_path):
    words = ["--cpt", str(untied.cpt), "--chat", str(untied.chat), "--out", str(tmp_path / "out")]
    result = cpt_merge("merge-models", *words, "--ratio", "0.5", "method=interpolate")
    assert result.returncode == 0, result.stderr
    result = cpt_merge("merge-models", *words[:4], "--out", str(tmp_path / "x"), "--ratio", "0.5")
    assert result.returncode == 2
