"""CPT, base and chat may each be a wrapper or a text model: only prefixes differ."""

import itertools
import json
import re
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from cpt_merge.checkpoint.export import LocalShard
from cpt_merge.core.distributed import Ranks
from cpt_merge.core.errors import UserError
from cpt_merge.merge import MergeConfig
from cpt_merge.merge.ancestry import pair_warnings
from cpt_merge.merge.extract import extract
from cpt_merge.merge.files import merge_directories
from cpt_merge.merge.hook import merge_shards
from cpt_merge.merge.plan import MergeInputs
from cpt_merge.tracking import Tracker
from tests.merge.conftest import write_tokenizer
from tests.wrappers import make_text_only, make_wrapper

ROWS, PLAIN = 48, 35  # rows, and the first of a token of the chat format
MODELS = {"base": 0, "chat": 1, "cpt": 2}
FAMILIES = ["gemma3", "mistral3", "qwen2.5-vl", "qwen3-vl", "llama4", "voxtral"]
KINDS = list(itertools.product(("wrapper", "text"), repeat=3))  # of cpt, base and chat


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """`made(family)`: its base, chat and CPT model, each as wrapper and as text model."""
    folders = {}

    def make(family, tied=False):
        if (family, tied) not in folders:
            root = folders[family, tied] = tmp_path_factory.mktemp("models")
            for name, seed in MODELS.items():
                wrapper = make_wrapper(root / "wrapper" / name, family, tied, seed, ROWS)
                make_text_only(root / "text" / name, family, wrapper)
                for kind in ("wrapper", "text"):
                    write_tokenizer(root / kind / name, "base")
        return folders[family, tied]

    return make


def core(name):
    """A name without prefixes."""
    return re.sub(r"^((model|language_model)\.)+", "", name)


def by_core(folder):
    return {core(name): values for name, values in load_file(folder / "model.safetensors").items()}


def inputs_of(root, kinds):
    cpt, base, chat = (
        root / kind / name for kind, name in zip(kinds, ("cpt", "base", "chat"), strict=True)
    )
    return MergeInputs(cpt, base, chat, cpt)


@pytest.mark.parametrize("kinds", KINDS, ids="-".join)
@pytest.mark.parametrize(
    ("family", "tied"),
    [
        ("gemma3", False),
        ("qwen3-vl", True),
        *(pytest.param(family, False, marks=pytest.mark.slow) for family in FAMILIES[1:]),
        pytest.param("gemma3", True, marks=pytest.mark.slow),
    ],
)
def test_every_combination_gives_the_same_elements(family, kinds, tied, made, tmp_path, capsys):
    root = made(family, tied)
    inputs = inputs_of(root, kinds)
    cpt, base, chat = (by_core(root / "wrapper" / name) for name in ("cpt", "base", "chat"))
    merge_directories(MergeConfig(ratio=0.5), inputs, tmp_path / "out")

    found = load_file(tmp_path / "out" / "model.safetensors")
    layout = load_file(inputs.cpt / "model.safetensors")
    assert found.keys() == layout.keys()
    text = by_core(root / "text" / "cpt").keys()
    for name, values in found.items():
        vector = (chat[core(name)] - base[core(name)]) * 0.5 if core(name) in text else 0
        expected = cpt[core(name)] + vector
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            values, expected = values[:PLAIN], expected[:PLAIN]
        assert torch.equal(values, expected), name
    said = capsys.readouterr().err
    towers = len(cpt.keys() - text)
    assert (f"{towers} tensors outside the text decoder" in said) == (kinds[0] == "wrapper")
    for label, kind in zip(("base", "chat"), kinds[1:], strict=True):
        lost = kinds[0] == "text" and kind == "wrapper"
        assert (f"{towers} tensors of {label} that are no part of CPT" in said) == lost

    config = json.loads((tmp_path / "out" / "config.json").read_text())
    architecture = getattr(transformers, config["architectures"][0])
    _, loading = architecture.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(loading.values())

    shards = [LocalShard(name, tuple(v.shape), 0, v) for name, v in layout.items()]
    arguments = (MergeConfig(ratio=0.5), inputs, tmp_path / "hook", Tracker(), Ranks())
    merge_shards(shards, *arguments)
    merged = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert (tmp_path / "hook" / "model.safetensors").read_bytes() == merged


@pytest.mark.parametrize("kinds", KINDS, ids="-".join)
def test_a_tied_cpt_gets_a_head_by_its_own_names(kinds, made, tmp_path):
    tied, untied = made("gemma3", tied=True), made("gemma3")
    inputs = inputs_of(untied, kinds)
    inputs = MergeInputs(tied / kinds[0] / "cpt", inputs.base, inputs.chat, inputs.base)
    merge_directories(MergeConfig(), inputs, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors").keys()
    assert found == load_file(untied / kinds[0] / "cpt" / "model.safetensors").keys()


@pytest.mark.parametrize("kinds", KINDS, ids="-".join)
def test_an_extracted_vector_fits_both(kinds, made, tmp_path):
    root = made("gemma3")
    inputs = inputs_of(root, kinds)
    merge_directories(MergeConfig(), inputs, tmp_path / "pair")
    extract(inputs.base, inputs.chat, tmp_path / "vector")
    of_vector = MergeInputs(inputs.cpt, None, None, inputs.cpt, tmp_path / "vector")
    merge_directories(MergeConfig(), of_vector, tmp_path / "from vector")
    merged, expected = (by_core(tmp_path / name) for name in ("from vector", "pair"))
    assert merged.keys() == expected.keys()
    assert all(torch.equal(values, merged[name]) for name, values in expected.items())


@pytest.mark.parametrize("label", ["cpt", "base", "chat"])
def test_a_wrapper_without_a_text_decoder_is_one_sentence(label, made, tmp_path):
    root = made("gemma3")
    shutil.copytree(root / "wrapper", tmp_path / "wrapper")
    file = tmp_path / "wrapper" / label / "model.safetensors"
    towers = {n: v for n, v in load_file(file).items() if not n.startswith("language_model")}
    save_file(towers, file)
    sentence = f"{label} contains 32 tensors of vision and 2 tensors of projector and no text"
    with pytest.raises(UserError, match=sentence):
        merge_directories(MergeConfig(), inputs_of(tmp_path, ["wrapper"] * 3), tmp_path / "out")


@pytest.mark.parametrize("kinds", itertools.product(("wrapper", "text"), repeat=2), ids="-".join)
def test_a_pair_of_both_kinds_is_compared_by_its_weights(kinds, made):
    """Names with other prefixes are the same tensors: a pair that shares none seemed to be equal."""
    root = made("gemma3")
    base, chat = (root / kind / name for kind, name in zip(kinds, ("base", "chat"), strict=True))
    equal = "chat equals base: there is no vector to add; check the two models."
    assert equal not in pair_warnings(base, chat)
    same = root / kinds[1] / "base"
    assert equal in pair_warnings(base, same)
