"""Heads that are tied in some of the models, or whose config.json and weights disagree."""

import json
from itertools import product

import pytest
import torch
from safetensors.torch import save_file

from cpt_merge.checkpoint.loaded import is_tied, open_model
from cpt_merge.checkpoint.tensor_kinds import is_by_token
from cpt_merge.checkpoint.tie_defaults import UNTIED
from cpt_merge.core.distributed import Ranks
from cpt_merge.core.errors import UserError
from cpt_merge.merge import MergeConfig
from cpt_merge.merge.extract import extract
from cpt_merge.merge.files import merge_directories
from cpt_merge.merge.memory import merge_model
from cpt_merge.merge.plan import MergeInputs
from cpt_merge.tokenizer_ext import EmbeddingsConfig
from cpt_merge.tokenizer_ext.embeddings.resize import resize_embeddings
from tests.merge.conftest import (
    HIDDEN,
    LAYERS,
    make_family,
    pieces_of,
    save_weights,
    write_tokenizer,
)
from tests.merge.test_merge_files import digest, load, merge
from tests.merge.test_merge_hook import export, masters, merge_in_memory, resized, shards_of

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture
def tied(tmp_path):
    return make_family(tmp_path / "models", tied=True)


def give_head(family, model, values=None):
    """A head stored next to the embedding of a tied model; config.json still says tied."""
    weights = family.weights[model]
    if values is None:
        random = torch.Generator().manual_seed(9)
        values = torch.randn(weights[EMBED].shape, generator=random).bfloat16()
    weights[HEAD] = values
    save_weights(weights, family.root / model)


def set_config(directory, **fields):
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def expected_row(family, name, token, ratio):
    """The formula for a token of all three models; a tied model's head is its embedding."""
    rows = {model: pieces_of(model).index(token) for model in ("cpt", "base", "chat")}
    cpt, base, chat = (
        family.weights[model].get(name, family.weights[model][EMBED])[rows[model]].float()
        for model in ("cpt", "base", "chat")
    )
    return (cpt + (chat - base) * ratio).bfloat16()


def check_rows(family, merged, ratio):
    for name, token in product((EMBED, HEAD), ("the", "a", "</s>")):
        row = pieces_of("cpt").index(token)
        assert torch.equal(merged[name][row], expected_row(family, name, token, ratio)), token


@pytest.mark.parametrize("own", [own for own in product([False, True], repeat=3) if any(own)])
def test_models_with_and_without_a_head_of_their_own_merge(tied, tmp_path, tracker, own, capsys):
    for model, has_head in zip(("cpt", "base", "chat"), own, strict=True):
        if has_head:
            give_head(tied, model)
    merge(tied, tmp_path / "out", tracker, ratio=0.7)
    check_rows(tied, load(tmp_path / "out"), 0.7)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    said = capsys.readouterr().err
    assert said.count("differs from model.embed_tokens.weight, although") == sum(own)
    assert ("there, lm_head.weight is the embedding" in said) == (not all(own))


def test_transformers_loads_the_kept_head(tied, tmp_path, tracker):
    from transformers import AutoModelForCausalLM

    give_head(tied, "cpt")
    merge(tied, tmp_path / "out", tracker)
    model, loading = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not loading["missing_keys"]
    assert torch.equal(model.lm_head.weight, load(tmp_path / "out")[HEAD])
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


def test_an_equal_head_next_to_a_tied_embedding_changes_nothing(tied, tmp_path, tracker):
    merge(tied, tmp_path / "without", tracker)
    for model in ("cpt", "chat"):
        give_head(tied, model, tied.weights[model][EMBED].clone())
    merge(tied, tmp_path / "with", tracker)
    assert digest(tmp_path / "with") == digest(tmp_path / "without")
    assert HEAD not in load(tmp_path / "with")


def test_a_head_alone_is_the_embedding(tied, tmp_path, tracker):
    """Some writers keep the first name of a shared tensor, which is the head's."""
    merge(tied, tmp_path / "both", tracker)
    weights = dict(tied.weights["cpt"])
    weights[HEAD] = weights.pop(EMBED)
    save_weights(weights, tied.cpt)
    merge(tied, tmp_path / "alone", tracker)
    assert digest(tmp_path / "alone") == digest(tmp_path / "both")


@pytest.mark.parametrize(
    ("top", "nested", "equal", "kept"),
    [
        (None, True, True, False),
        (False, True, True, False),
        (True, False, True, False),
        (None, True, False, True),
        (False, False, True, True),
        (None, None, True, False),
    ],
)
def test_a_tie_may_be_stated_in_the_text_section_alone(tied, top, nested, equal, kept):
    give_head(tied, "cpt", tied.weights["cpt"][EMBED].clone() if equal else None)
    fields = {"tie_word_embeddings": top, "text_config": {"tie_word_embeddings": nested}}
    config = json.loads((tied.cpt / "config.json").read_text())
    config |= {name: value for name, value in fields.items() if value is not None}
    if top is None:
        del config["tie_word_embeddings"]
    if nested is None:
        del config["text_config"]
    (tied.cpt / "config.json").write_text(json.dumps(config))
    assert (HEAD in open_model(tied.cpt).tensors) == kept


def test_a_model_without_the_head_that_its_config_asks_for_is_refused(tied):
    set_config(tied.cpt, tie_word_embeddings=False)
    with pytest.raises(UserError, match=r"cpt has no output head, although its config.json says"):
        open_model(tied.cpt)


def test_a_trained_head_of_the_base_grows_with_the_embedding(tied, tmp_path):
    give_head(tied, "base")
    set_config(tied.base, text_config={"tie_word_embeddings": True})
    resize_embeddings(EmbeddingsConfig(), tied.base, tied.tokenizer, tmp_path / "out")
    found = load(tmp_path / "out")
    for name in (EMBED, HEAD):
        assert len(found[name]) == tied.vocabulary.rows
        assert torch.equal(found[name][: tied.vocabulary.base_rows], tied.weights["base"][name])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert config["text_config"]["tie_word_embeddings"] is False


def test_an_extracted_vector_gives_the_same_bytes(tied, tmp_path, tracker):
    give_head(tied, "chat")
    extract(tied.base, tied.chat, tmp_path / "vector")
    merge(tied, tmp_path / "pair", tracker, ratio=0.7)
    inputs = MergeInputs(tied.cpt, None, None, tied.tokenizer, tmp_path / "vector")
    merge_directories(MergeConfig(ratio=0.7), inputs, tmp_path / "out", tracker)
    assert digest(tmp_path / "out") == digest(tmp_path / "pair")


def test_a_vector_of_a_tied_pair_is_added_to_an_untied_model(tied, tmp_path, tracker):
    extract(tied.base, tied.chat, tmp_path / "vector")
    give_head(tied, "cpt")
    merge(tied, tmp_path / "pair", tracker, ratio=0.7)
    inputs = MergeInputs(tied.cpt, tied.base, None, tied.tokenizer, tmp_path / "vector")
    merge_directories(MergeConfig(ratio=0.7), inputs, tmp_path / "out", tracker)
    assert digest(tmp_path / "out") == digest(tmp_path / "pair")


@pytest.mark.parametrize("model", ["base", "chat"])
def test_hook_export_and_file_merge_agree(tied, tmp_path, tracker, model):
    """A head in the base is trained; one in the chat model alone comes with the vector."""
    give_head(tied, model)
    weights = masters(tied)
    if model == "base":
        weights[HEAD] = (weights[EMBED] + 1).bfloat16().float()
    save_file({name: v.bfloat16() for name, v in weights.items()}, tied.cpt / "model.safetensors")
    set_config(tied.cpt, tie_word_embeddings=model == "chat")
    shards = shards_of(weights, 0, 1)
    export(tied, shards, Ranks(), tmp_path / "cpt")
    assert (HEAD in load(tmp_path / "cpt")) == (model == "base")
    config = json.loads((tmp_path / "cpt" / "config.json").read_text())
    assert config["tie_word_embeddings"] is (model == "chat")
    merge_in_memory(tied, MergeConfig(ratio=0.7), shards, Ranks(), tmp_path / "hook")
    inputs = MergeInputs(tied.cpt, tied.base, tied.chat, tied.tokenizer)
    merge_directories(MergeConfig(ratio=0.7), inputs, tmp_path / "files", tracker)
    assert digest(tmp_path / "hook") == digest(tmp_path / "files")
    assert HEAD in load(tmp_path / "hook")


def test_a_tied_model_in_memory_cannot_get_a_head(tied):
    from transformers import AutoModelForCausalLM

    give_head(tied, "chat")
    model = AutoModelForCausalLM.from_pretrained(resized(tied))
    inputs = MergeInputs(resized(tied), tied.base, tied.chat, tied.tokenizer)
    with pytest.raises(UserError, match="the merged model needs one; merge from files"):
        merge_model(model, MergeConfig(), inputs)


def test_a_bias_does_not_untie_the_head(tmp_path, tracker):
    """Phi and GPT-J have a bias in their head, which is no head of its own."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 4, "rotary_dim": 4, "n_positions": 64}
    config = AutoConfig.for_model("gptj", **sizes, vocab_size=48, tie_word_embeddings=True)
    for seed, name in enumerate(("base", "chat", "cpt")):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        torch.nn.init.normal_(model.lm_head.bias)
        model.save_pretrained(tmp_path / name)
        write_tokenizer(tmp_path / name, "base")
    inputs = MergeInputs(tmp_path / "cpt", tmp_path / "base", tmp_path / "chat", None)
    merge_directories(MergeConfig(), inputs, tmp_path / "out", tracker)
    model, loading = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not loading["missing_keys"]
    assert model.config.tie_word_embeddings
    assert model.lm_head.weight is model.transformer.wte.weight


def test_a_family_without_a_tied_head_needs_one_even_if_its_config_is_silent(tied):
    """As transformers, which would make a random head."""
    config = json.loads((tied.cpt / "config.json").read_text())
    del config["tie_word_embeddings"]
    (tied.cpt / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"does not say that it is tied, which in llama"):
        open_model(tied.cpt)
    set_config(tied.cpt, model_type="gemma")
    assert HEAD not in open_model(tied.cpt).tensors


def test_the_families_without_a_tied_head_are_those_of_transformers():
    from transformers import CONFIG_MAPPING

    assert UNTIED & set(CONFIG_MAPPING) >= {"llama", "mistral", "qwen2", "gptj", "phi"}
    tied = {n for n in UNTIED & set(CONFIG_MAPPING) if CONFIG_MAPPING[n]().tie_word_embeddings}
    assert not tied


def test_layers_that_config_json_does_not_count_are_left_out(untied, tmp_path, tracker, capsys):
    for model in ("base", "chat", "cpt"):
        set_config(untied.root / model, num_hidden_layers=1)
    merge(untied, tmp_path / "out", tracker, ratio="ramp(0.5, 1)")
    assert not any(".layers.1." in name for name in load(tmp_path / "out"))
    assert "9 tensors (model.layers.1." in capsys.readouterr().err


def test_blocks_that_are_left_out_are_not_counted_in_config_json(untied, tmp_path, tracker):
    """DeepSeek and GLM; other families count them in lists by layer, too (Step)."""
    fields = {"num_nextn_predict_layers": 1, "layer_types": ["full_attention"] * (LAYERS + 1)}
    extra = {f"model.layers.{LAYERS}.eh_proj.weight": torch.ones(HIDDEN, 2 * HIDDEN)}
    for model in ("base", "chat", "cpt"):
        set_config(untied.root / model, **fields, num_hidden_layers=LAYERS)
        save_weights({**untied.weights[model], **extra}, untied.root / model)
    merge(untied, tmp_path / "out", tracker)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_nextn_predict_layers"] == 0
    assert config["layer_types"] == ["full_attention"] * LAYERS
    assert config["tie_word_embeddings"] is False


def test_layers_of_towers_and_halves_have_counts_of_their_own(untied):
    extra = {f"{n}.layers.7.w.weight": torch.ones(2) for n in ("model.tower", "encoder")}
    save_weights({**untied.weights["cpt"], **extra}, untied.cpt)
    assert extra.keys() <= open_model(untied.cpt).tensors.keys()
    set_config(untied.cpt, num_hidden_layers=1, decoder_layers=2)
    assert any(".layers.1." in name for name in open_model(untied.cpt).tensors)


@pytest.mark.parametrize("name", ["decoder.weight", "lm_head.decoder.weight"])
def test_a_head_that_is_called_decoder(untied, name):
    """ModernBERT and RoBERTa as decoders."""
    weights = dict(untied.weights["cpt"])
    weights[name] = weights.pop(HEAD)
    save_weights(weights, untied.cpt)
    assert is_by_token(name)
    assert not is_tied(open_model(untied.cpt))


def test_a_head_of_unknown_name_is_said_to_be_unknown(untied):
    weights = dict(untied.weights["cpt"])
    weights["prophet.weight"] = weights.pop(HEAD)
    save_weights(weights, untied.cpt)
    with pytest.raises(UserError, match=r"no output head with a known name.*prophet.weight may be"):
        open_model(untied.cpt)
