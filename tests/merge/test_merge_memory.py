"""The merge in memory: the tensors of the merged checkpoint, whatever the ratio before was."""

import pytest
import torch

from cpt_merge.checkpoint.export import LocalShard
from cpt_merge.merge import MergeConfig
from cpt_merge.merge.memory import merge_into, merge_model, merge_shard, ranges_of
from cpt_merge.merge.plan import MergeInputs, plan, plan_again
from tests.merge.test_merge_files import inputs_of, load, merge


def empty_like(the_plan, dtype):
    return {
        tensor.name: torch.full(tensor.spec.shape, torch.nan, dtype=dtype)
        for tensor in the_plan.tensors
    }


@pytest.mark.parametrize(
    "settings",
    [{}, {"new_rows": "constituents", "rules": [{"kinds": ["norm"], "action": "skip"}]},
     {"method": "ties", "density": 0.4, "gate": True}],
    ids=["plain", "rules", "ties and gate"],
)  # fmt: skip
def test_equal_to_the_files_in_any_order_of_ratios(family, tmp_path, tracker, settings):
    first = plan(MergeConfig(**settings), inputs_of(family))
    tensors, ranges = empty_like(first, torch.float32), {}
    for ratio in (0.3, "ramp(0.2, 1.1)"):
        config = MergeConfig(ratio=ratio, **settings)
        the_plan = plan_again(first, config)
        ranges = ranges_of(the_plan, ranges)
        merge_into(the_plan, tensors, ranges)
        merge(family, tmp_path / str(ratio), tracker, **config.model_dump())
        merged = load(tmp_path / str(ratio))
        assert merged.keys() == tensors.keys()
        for name, values in merged.items():
            assert torch.equal(tensors[name], values.float()), (ratio, name)


def test_a_shard_is_merged_as_it_is_in_the_whole(family, tmp_path, tracker):
    the_plan = plan(MergeConfig(ratio=0.7), inputs_of(family))
    merge(family, tmp_path / "out", tracker, ratio=0.7)
    merged = load(tmp_path / "out")
    for name, values in family.weights["cpt"].items():
        half = len(values) // 2
        for start, rows in ((0, values[:half]), (half, values[half:])):
            found = merge_shard(
                the_plan, LocalShard(name, tuple(values.shape), start, rows.float()), {}
            )
            assert torch.equal(found, merged[name][start : start + len(rows)].float()), name


@pytest.mark.parametrize("settings", [{}, {"gate": True}], ids=["plain", "gate"])
def test_a_model_in_memory_gets_the_weights_of_the_files(family, tmp_path, tracker, settings):
    from transformers import AutoModelForCausalLM

    merge(family, tmp_path / "out", tracker, ratio=0.7, **settings)
    model = AutoModelForCausalLM.from_pretrained(family.cpt)
    inputs = MergeInputs(family.cpt, family.base, family.chat, family.tokenizer)
    the_plan = merge_model(model, MergeConfig(ratio=0.7, **settings), inputs)
    assert the_plan.format.stop_ids == [2, 35]
    state = model.state_dict()
    for name, values in load(tmp_path / "out").items():
        assert torch.equal(state[name], values), name


def test_rules_that_decide_nothing_are_refused_here_too(family):
    from cpt_merge.core.errors import UserError

    first = plan(MergeConfig(), inputs_of(family))
    with pytest.raises(UserError, match="matches no tensor"):
        plan_again(first, MergeConfig(rules=[{"pattern": "nowhere", "ratio": 0.5}]))
