"""The merge of shards against the merge of files: equal bytes, whatever the ranks."""

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cpt_merge.checkpoint.export import LocalShard, export_shards
from cpt_merge.checkpoint.reader import Checkpoint
from cpt_merge.core.distributed import Ranks, joined
from cpt_merge.core.errors import UserError
from cpt_merge.core.world import World
from cpt_merge.merge import MergeConfig
from cpt_merge.merge.hook import merge_shards
from cpt_merge.merge.plan import MergeInputs
from cpt_merge.tokenizer_ext import EmbeddingsConfig
from cpt_merge.tokenizer_ext.embeddings.resize import resize_embeddings
from cpt_merge.tracking import Tracker
from tests.distributed import run_ranks
from tests.merge.conftest import CPT_ROWS, make_family
from tests.merge.test_merge_files import digest, load, merge


def masters(family, seed=None):
    """fp32 master weights.

    Exactly CPT's values, or (with a seed) values that bfloat16 does not have.
    """
    weights = {name: values.float() for name, values in family.weights["cpt"].items()}
    if seed is not None:
        random = torch.Generator().manual_seed(seed)
        weights = {
            name: values + 1e-4 * torch.randn(values.shape, generator=random)
            for name, values in weights.items()
        }
    return weights


def shards_of(weights, rank, size):
    """Rows divided unevenly.

    As FSDP2 does it (torch.chunk), but the first rank gives its rows of norms to the last.
    """
    shards = []
    for name, values in weights.items():
        bounds = [0, *torch.tensor([len(part) for part in values.chunk(size)]).cumsum(0).tolist()]
        bounds += [len(values)] * (size + 1 - len(bounds))
        if values.dim() == 1 and size > 1:
            bounds[1:] = [0] * (size - 1) + [len(values)]
        elif size > 2:
            bounds[1] += 3
        shards.append(
            LocalShard(
                name, tuple(values.shape), bounds[rank], values[bounds[rank] : bounds[rank + 1]]
            )
        )
    return shards


def resized(family):
    out = family.root / "resized"
    if not out.exists():
        resize_embeddings(EmbeddingsConfig(), family.base, family.tokenizer, out)
    return out


def export(family, shards, ranks, out, **more):
    export_shards(shards, resized(family), family.tokenizer, out, ranks, **more)


def merge_in_memory(family, config, shards, ranks, out):
    like, tracker = resized(family), Tracker()
    inputs = MergeInputs(like, family.base, family.chat, family.tokenizer)
    return merge_shards(shards, config, inputs, out, tracker, ranks)


class ThreadRanks(Ranks):
    """Ranks that are threads of this process."""

    def __init__(self, rank, size, barrier, values):
        super().__init__(World(rank, size))
        object.__setattr__(self, "meet", barrier)
        object.__setattr__(self, "values", values)

    def barrier(self):
        self.meet.wait()

    def gather(self, value):
        self.values[self.rank] = value
        self.meet.wait()
        found = [self.values[rank] for rank in range(self.size)]
        self.meet.wait()
        return found


def on_ranks(size, work):
    """`work(rank, Ranks)` on threads that meet at a barrier."""
    barrier, values = threading.Barrier(size, timeout=20), {}
    with ThreadPoolExecutor(size) as pool:
        return list(
            pool.map(lambda rank: work(rank, ThreadRanks(rank, size, barrier, values)), range(size))
        )


SETTINGS = {
    "add": {"ratio": 0.7, "new_rows": "constituents", "shard_size": 20e3 / 1e9},
    "ties and a gate": {"method": "ties", "density": 0.4, "gate": True, "ratio": "ramp(0.5, 1)"},
    "dare_ties": {"method": "dare_ties", "density": 0.4, "seed": 3, "new_rows": "constituents"},
}


@pytest.mark.parametrize("settings", list(SETTINGS.values()), ids=list(SETTINGS))
@pytest.mark.parametrize("size", [1, 3])
def test_hook_and_files_give_equal_bytes(family, tmp_path, tracker, size, settings):
    """Invariant "one rounding"."""
    second = {"base": str(family.base), "chat": str(family.chat), "ratio": -0.2}
    config = MergeConfig(**settings, vectors=[] if "shard_size" in settings else [second])
    weights = masters(family)
    resized(family)
    on_ranks(
        size,
        lambda rank, ranks: export(family, shards_of(weights, rank, size), ranks, tmp_path / "cpt"),
    )
    results = on_ranks(
        size,
        lambda rank, ranks: merge_in_memory(
            family, config, shards_of(weights, rank, size), ranks, tmp_path / "hook"
        ),
    )
    exported = load(tmp_path / "cpt")
    assert all(
        torch.equal(exported[name], values) for name, values in family.weights["cpt"].items()
    )
    from_files = merge(family, tmp_path / "files", tracker, **config.model_dump())
    assert digest(tmp_path / "hook") == digest(tmp_path / "files")
    assert results[0]["rows"] == from_files["rows"]
    assert results[0]["overall"] == pytest.approx(from_files["overall"], abs=1e-4)
    assert results[1:] == [{}] * (size - 1)
    for file in (
        "config.json",
        "generation_config.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    ):
        assert (tmp_path / "hook" / file).read_bytes() == (
            tmp_path / "files" / file
        ).read_bytes(), file


def _one_of_several(root: str, out: str) -> int:
    with joined() as ranks:
        family = make_family(Path(root) / f"copy{ranks.rank}")
        family.root = Path(root) / "shared"
        shards = shards_of(masters(family, seed=5), ranks.rank, ranks.size)
        export(family, shards, ranks, Path(out) / "cpt")
        merge_in_memory(family, MergeConfig(ratio=0.7), shards, ranks, Path(out) / "chat")
    return os.getpid()


def test_real_processes_give_the_bytes_of_one(tmp_path):
    family = make_family(tmp_path / "shared")
    resized(family)
    assert len(set(run_ranks(_one_of_several, 3, str(tmp_path), str(tmp_path / "out")))) == 3
    shards = shards_of(masters(family, seed=5), 0, 1)
    export(family, shards, Ranks(), tmp_path / "cpt")
    merge_in_memory(family, MergeConfig(ratio=0.7), shards, Ranks(), tmp_path / "chat")
    assert digest(tmp_path / "out" / "cpt") == digest(tmp_path / "cpt")
    assert digest(tmp_path / "out" / "chat") == digest(tmp_path / "chat")


def test_masters_are_rounded_once(untied, tmp_path):
    """The hook starts from the fp32 masters, not from the exported CPT's rounding of them."""
    weights = masters(untied, seed=5)
    merge_in_memory(untied, MergeConfig(), shards_of(weights, 0, 1), Ranks(), tmp_path / "out")
    name = "model.layers.0.mlp.up_proj.weight"
    base, chat = (untied.weights[model][name].float() for model in ("base", "chat"))
    once = (weights[name] + (chat - base)).bfloat16()
    twice = (weights[name].bfloat16().float() + (chat - base)).bfloat16()
    assert torch.equal(load(tmp_path / "out")[name], once)
    assert not torch.equal(once, twice)


def test_the_export_is_a_checkpoint_that_can_be_trained_and_merged(untied, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    export(untied, shards_of(masters(untied), 0, 1), Ranks(), tmp_path / "cpt", dtype="float32")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "cpt")
    assert model.dtype == torch.float32
    assert model.config.vocab_size == CPT_ROWS
    assert AutoTokenizer.from_pretrained(tmp_path / "cpt").convert_tokens_to_ids("ing") == 38
    assert (tmp_path / "cpt" / "vocabulary_map.json").is_file()
    assert torch.equal(
        load_file(tmp_path / "cpt" / "model.safetensors")["lm_head.weight"],
        masters(untied)["lm_head.weight"],
    )


def test_any_float_type_and_shape_comes_through(tmp_path, untied):
    like = tmp_path / "like"
    like.mkdir()
    (like / "config.json").write_text('{"tie_word_embeddings": false}')
    from safetensors.torch import save_file

    weights = {
        "scale": torch.tensor(2.5),
        "bias": torch.arange(3.0),
        "cube": torch.randn(4, 3, 2).bfloat16(),
    }
    save_file(
        {name: values.float() for name, values in weights.items()}, like / "model.safetensors"
    )
    shards = [LocalShard(name, tuple(values.shape), 0, values) for name, values in weights.items()]
    shards.append(LocalShard("bias", (3,), 3, torch.zeros(0)))  # an empty one does no harm
    export_shards(shards, like, untied.tokenizer, tmp_path / "out", Ranks())
    assert all(
        torch.equal(load(tmp_path / "out")[name], values.float())
        for name, values in weights.items()
    )


def test_a_missing_row_is_noticed_before_publishing(untied, tmp_path):
    shards = shards_of(masters(untied), 0, 1)
    with pytest.raises(UserError, match=r"model\.norm\.weight were never written"):
        export(
            untied,
            [shard for shard in shards if shard.name != "model.norm.weight"],
            Ranks(),
            tmp_path / "cpt",
        )
    assert not (tmp_path / "cpt").exists()


def test_a_row_that_two_ranks_pass_is_noticed(untied, tmp_path):
    shards = shards_of(masters(untied), 0, 1)
    with pytest.raises(UserError, match="written twice"):
        export(
            untied,
            [*shards, LocalShard("model.norm.weight", (32,), 3, torch.zeros(2))],
            Ranks(),
            tmp_path / "cpt",
        )


@pytest.mark.parametrize("name", ["model.strange.weight", "model.norm.weight"])
def test_a_shard_that_does_not_fit_is_named(untied, tmp_path, name):
    with pytest.raises(UserError, match=name):
        export(untied, [LocalShard(name, (7,), 0, torch.zeros(7))], Ranks(), tmp_path / "cpt")


def test_nan_in_the_masters_is_named(untied, tmp_path):
    weights = masters(untied)
    weights["model.norm.weight"][3] = float("nan")
    with pytest.raises(UserError, match=r"model\.norm\.weight"):
        export(untied, shards_of(weights, 0, 1), Ranks(), tmp_path / "cpt")
    with pytest.raises(UserError, match=r"model\.norm\.weight of the cpt model"):
        merge_in_memory(untied, MergeConfig(), shards_of(weights, 0, 1), Ranks(), tmp_path / "chat")


def test_a_rank_reads_only_its_own_rows(untied, tmp_path, monkeypatch):
    weights, read = masters(untied), []
    resized(untied)
    original = Checkpoint.read_flat

    def counting(self, name, start, stop):
        read.append((threading.get_ident(), self.directory.name, stop - start))
        return original(self, name, start, stop)

    monkeypatch.setattr(Checkpoint, "read_flat", counting)

    def work(rank, ranks):
        time.sleep(0)
        merge_in_memory(untied, MergeConfig(), shards_of(weights, rank, 2), ranks, tmp_path / "out")
        return threading.get_ident(), sum(
            shard.values.numel() for shard in shards_of(weights, rank, 2)
        )

    for thread, own in on_ranks(2, work):
        for model in ("base", "chat"):
            assert (
                sum(count for reader, source, count in read if (reader, source) == (thread, model))
                <= own
            )
