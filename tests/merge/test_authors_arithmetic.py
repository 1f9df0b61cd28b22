"""The arithmetic that the authors published (github.com/aqweteddy/ChatVector), against ours.

Theirs: the vector is computed and stored in the checkpoints' own type, then `p += ratio * v` for
one vector after the other. In float32 that is this merge's order of operations, so the bytes are
equal. In bfloat16 theirs rounds the difference, the product and each sum; results then differ by a
unit in the last place of the largest operand (the vector is one) for each vector. Where
vocabularies have equal rows, that is, and without the chat format, which they take from the base by
mistake.
"""

import pytest
import torch

from cpt_merge.merge import MergeConfig
from cpt_merge.merge.files import merge_directories
from cpt_merge.merge.plan import MergeInputs
from tests.merge.conftest import draw, save_weights, shapes, write_config
from tests.merge.test_merge_files import load

SKIP_EMBED = [{"kinds": ["embed", "head"], "action": "skip"}]


def published(weights, ratios, skip_embed):
    """All vectors' models are in `weights`: cpt, base, and chat, chat2."""
    merged = {}
    for name, cpt in weights["cpt"].items():
        merged[name] = cpt.clone()
        if skip_embed and ("embed_tokens" in name or "lm_head" in name):
            continue
        for ratio, chat in zip(ratios, ("chat", "chat2"), strict=False):
            vector = weights[chat][name] - weights["base"][name]
            merged[name] += ratio * vector
    return merged


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def weights(request, tmp_path):
    """Four models with equal rows and no tokenizers."""
    base = draw(shapes(40, False), 0.02, 0)
    found = {"base": base}
    for seed, (model, scale) in enumerate(
        {"chat": 0.002, "chat2": 0.003, "cpt": 0.004}.items(), start=1
    ):
        change = draw(shapes(40, False), scale, seed)
        found[model] = {name: values + change[name] for name, values in base.items()}
    found = {
        model: {name: v.to(request.param) for name, v in of_model.items()}
        for model, of_model in found.items()
    }
    for model, of_model in found.items():
        (tmp_path / model).mkdir()
        save_weights(of_model, tmp_path / model)
        write_config(tmp_path / model, 40, False)
    return found


@pytest.mark.parametrize("skip_embed", [False, True], ids=["", "skip_embed"])
@pytest.mark.parametrize("ratios", [[1.0], [0.7], [0.5, 0.5], [1.0, -0.3]], ids=str)
def test_equal_to_the_authors_arithmetic(weights, tmp_path, tracker, ratios, skip_embed):
    second = {"base": str(tmp_path / "base"), "chat": str(tmp_path / "chat2")}
    config = MergeConfig(
        ratio=ratios[0],
        vectors=[{**second, "ratio": ratio} for ratio in ratios[1:]],
        rules=SKIP_EMBED if skip_embed else [],
    )
    if skip_embed and len(ratios) > 1:
        config = config.model_copy(
            update={
                "vectors": [v.model_copy(update={"rules": config.rules}) for v in config.vectors]
            }
        )
    inputs = MergeInputs(tmp_path / "cpt", tmp_path / "base", tmp_path / "chat", tmp_path / "cpt")
    merge_directories(config, inputs, tmp_path / "out", tracker)
    merged, theirs = load(tmp_path / "out"), published(weights, ratios, skip_embed)
    for name, values in merged.items():
        if values.dtype == torch.float32:
            assert torch.equal(values, theirs[name]), name
        else:
            operands = [
                *(of_model[name].float() for of_model in weights.values()),
                values.float(),
                theirs[name].float(),
            ]
            operands += [
                weights[chat][name].float() - weights["base"][name].float()
                for chat in ("chat", "chat2")
            ]
            unit = 2.0 ** (torch.floor(torch.log2(torch.stack(operands).abs().amax(0))) - 7)
            assert ((values.float() - theirs[name].float()).abs() <= unit * len(ratios)).all(), name
