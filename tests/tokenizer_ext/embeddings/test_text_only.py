"""The text decoder of a wrapper becomes a model of its own when it gets its new rows."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file

from cpt_merge.checkpoint.vocabulary_map import VocabularyMap
from cpt_merge.core.errors import UserError
from cpt_merge.tokenizer_ext import EmbeddingsConfig
from cpt_merge.tokenizer_ext.embeddings.resize import resize_embeddings
from tests.merge.conftest import write_tokenizer
from tests.wrappers import VOCABULARY, make_text_only, make_wrapper

CLASSES = {
    "gemma3": "Gemma3ForCausalLM", "mistral3": "MistralForCausalLM", "llava": "LlamaForCausalLM",
    "llama4": "Llama4ForCausalLM", "voxtral": "LlamaForCausalLM",
}  # fmt: skip


def resized(folder, more=0):
    """The text decoder of the wrapper in `base`, with further rows."""
    write_tokenizer(folder / "longer", "base")
    rows = list(range(VOCABULARY, VOCABULARY + more))
    VocabularyMap(VOCABULARY, VOCABULARY + more, [], [], rows).save(folder / "longer")
    where = folder / "base", folder / "longer", folder / "out"
    resize_embeddings(EmbeddingsConfig(), *where, without_towers=True)
    return folder / "out"


@pytest.mark.parametrize("family", CLASSES)
def test_a_text_model_comes_out_and_says_what_the_wrapper_says(family, tmp_path):
    wrapper = make_wrapper(tmp_path / "base", family)
    make_text_only(tmp_path / "text", family, wrapper)
    (tmp_path / "base" / "preprocessor_config.json").write_text("{}")
    out = resized(tmp_path)
    found, expected = (load_file(place / "model.safetensors") for place in (out, tmp_path / "text"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(values, found[name]) for name, values in expected.items())
    assert not list(out.glob("*processor*"))

    model, loading = transformers.AutoModelForCausalLM.from_pretrained(
        out, output_loading_info=True
    )
    assert not any(loading.values())
    assert [type(model).__name__] == model.config.architectures == [CLASSES[family]]
    ids = torch.arange(3, 15).view(1, -1)
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, wrapper(input_ids=ids).logits, atol=1e-5)


def test_files_that_contain_towers_alone_are_left_out(tmp_path):
    wrapper = make_wrapper(tmp_path / "base", "gemma3", tied=True)
    (tmp_path / "base" / "model.safetensors").unlink()
    wrapper.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    files = {file.name for file in (tmp_path / "base").glob("*.safetensors")}
    out = resized(tmp_path, more=8)
    kept = {file.name for file in out.glob("*.safetensors")}
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert kept == set(index.values()) < files
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(
        out, output_loading_info=True
    )
    assert not any(loading.values())
    assert model.config.tie_word_embeddings
    assert len(model.get_input_embeddings().weight) == model.config.vocab_size == VOCABULARY + 8


def test_what_has_no_text_model_is_refused(tmp_path):
    make_wrapper(tmp_path / "base", "qwen2.5-vl")
    with pytest.raises(UserError, match=r"no class for the text decoder of .*base alone"):
        resized(tmp_path)
    wrapper = make_wrapper(tmp_path / "other", "gemma3")
    make_text_only(tmp_path / "base", "gemma3", wrapper)
    with pytest.raises(UserError, match=r"leaves out towers, and .*base has none"):
        resized(tmp_path)
