"""Models with towers, and models whose tables by token are not all of one size."""

import json

import pytest
import torch
import transformers
from safetensors.torch import save_file

from cpt_merge.checkpoint.export import LocalShard, export_shards
from cpt_merge.checkpoint.vocabulary_map import NewPiece, VocabularyMap
from cpt_merge.core.distributed import Ranks
from cpt_merge.core.errors import UserError
from cpt_merge.merge import MergeConfig
from cpt_merge.merge.config import RuleConfig
from cpt_merge.merge.extract import extract
from cpt_merge.merge.files import merge_directories
from cpt_merge.merge.plan import MergeInputs
from cpt_merge.tokenizer_ext import EmbeddingsConfig
from cpt_merge.tokenizer_ext.base_tokenizer import read_rows
from cpt_merge.tokenizer_ext.embeddings.resize import resize_embeddings
from tests.merge.conftest import make_family, write_tokenizer
from tests.merge.test_merge_files import digest, load

TEXT = {
    "vocab_size": 48, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": None,
    "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
TOWER = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 6, "num_attention_heads": 2,
    "image_size": 8, "patch_size": 4,
}  # fmt: skip


def llava():
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**TOWER),
        text_config=transformers.LlamaConfig(**TEXT),
        image_token_index=47,
    )
    return transformers.LlavaForConditionalGeneration(config)


def gemma3():
    config = transformers.Gemma3Config(
        vision_config=transformers.SiglipVisionConfig(**TOWER).to_dict(),
        text_config=transformers.Gemma3TextConfig(**TEXT).to_dict(),
        mm_tokens_per_image=4,
    )
    return transformers.Gemma3ForConditionalGeneration(config)


def mllama():
    vision = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_global_layers": 2,
        "attention_heads": 2, "image_size": 8, "patch_size": 4, "intermediate_layers_indices": [0],
        "vision_output_dim": 32, "supported_aspect_ratios": [[1, 1]],
    }  # fmt: skip
    text = {**TEXT, "cross_attention_layers": [1], "tie_word_embeddings": False}
    text.pop("head_dim")
    config = transformers.MllamaConfig(
        vision_config=vision, text_config=transformers.models.mllama.MllamaTextConfig(**text)
    )
    return transformers.MllamaForConditionalGeneration(config)


def gemma3n():
    sizes = {
        **TEXT, "vocab_size_per_layer_input": 44, "hidden_size_per_layer_input": 4,
        "layer_types": ["sliding_attention", "full_attention"], "num_kv_shared_layers": 0,
        "intermediate_size": [48, 48], "activation_sparsity_pattern": [0.0, 0.0], "laurel_rank": 4,
    }  # fmt: skip
    return transformers.Gemma3nForCausalLM(transformers.Gemma3nTextConfig(**sizes))


def make(build, root):
    """base, and chat and cpt near it, as transformers saves them; all with base's tokenizer."""
    weights = {}
    for seed, name in enumerate(("base", "chat", "cpt")):
        torch.manual_seed(0)
        model = build()
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters() if seed else ():
                parameter += 0.01 * torch.randn_like(parameter)
        model.save_pretrained(root / name)
        write_tokenizer(root / name, "base")
        weights[name] = load(root / name)
    return weights


def inputs_of(root):
    return MergeInputs(root / "cpt", root / "base", root / "chat", root / "cpt")


def merged(root, out, **config):
    merge_directories(MergeConfig(**config), inputs_of(root), root / out)
    return load(root / out)


def close(found, weights, name, ratio):
    expected = weights["cpt"][name] + (weights["chat"][name] - weights["base"][name]) * ratio
    return torch.equal(found[name], expected)


@pytest.mark.parametrize("build", [llava, gemma3])
def test_layers_are_the_text_decoder_s_and_towers_get_no_vector(build, tmp_path, capsys):
    weights = make(build, tmp_path)
    found = merged(tmp_path, "out", ratio="ramp(0, 1)")
    assert set(found) == set(weights["cpt"])
    towers = [n for n in found if "vision" in n or "projector" in n]
    layers = {n: int("layers.1." in n) for n in found if ".layers." in n and n not in towers}
    assert towers
    assert layers
    for name in towers:
        assert torch.equal(found[name], weights["cpt"][name]), name
    for name, ratio in layers.items():
        assert close(found, weights, name, ratio), name
    said = capsys.readouterr().err
    assert f"{len(towers)} tensors outside the text decoder" in said
    assert "a rule with kinds: [vision, projector] and action: add" in said

    rules = [RuleConfig(kinds=["vision"], ratio=0.5), RuleConfig(layers=(1, 1), action="skip")]
    found = merged(tmp_path, "ruled", rules=rules)
    for name in towers:
        assert close(found, weights, name, 0.5 if "vision_tower" in name else 0.0), name
    for name, skipped in layers.items():
        assert close(found, weights, name, 1 - skipped), name
    model = getattr(
        transformers, json.loads((tmp_path / "out/config.json").read_text())["architectures"][0]
    )
    _, loading = model.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]


def test_base_and_chat_need_no_towers(tmp_path, capsys):
    weights = make(llava, tmp_path)
    for name in ("base", "chat"):
        text = {
            n: v for n, v in weights[name].items() if "vision" not in n and "projector" not in n
        }
        save_file(text, tmp_path / name / "model.safetensors", {"format": "pt"})
    found = merged(tmp_path, "out")
    assert set(found) == set(weights["cpt"])
    extract(tmp_path / "base", tmp_path / "chat", tmp_path / "vector")
    inputs = MergeInputs(tmp_path / "cpt", None, None, tmp_path / "cpt", tmp_path / "vector")
    merge_directories(MergeConfig(), inputs, tmp_path / "from vector")
    assert digest(tmp_path / "from vector") == digest(tmp_path / "out")


def test_towers_that_cpt_lacks_are_left_out_and_said(tmp_path, capsys):
    weights = make(llava, tmp_path)
    text = {n: v for n, v in weights["cpt"].items() if "vision" not in n and "projector" not in n}
    save_file(text, tmp_path / "cpt" / "model.safetensors", {"format": "pt"})
    assert set(merged(tmp_path, "out")) == set(text)
    assert "tensors of base that are no part of CPT are left out (" in capsys.readouterr().err


def test_a_tower_of_one_model_is_no_part_of_its_vector(tmp_path):
    weights = make(llava, tmp_path)
    text = {n: v for n, v in weights["base"].items() if "vision" not in n and "projector" not in n}
    save_file(text, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    extract(tmp_path / "base", tmp_path / "chat", tmp_path / "vector")
    assert set(load(tmp_path / "vector")) == set(text)


@pytest.mark.parametrize(
    ("build", "table", "rows"),
    [(mllama, "lm_head.weight", 48), (gemma3n, "model.embed_tokens_per_layer.weight", 44)],
)
def test_a_table_with_fewer_rows_merges_and_cannot_be_resized(build, table, rows, tmp_path):
    weights = make(build, tmp_path)
    stored = next(name for name in weights["cpt"] if name.endswith(table.removeprefix("model.")))
    found = merged(tmp_path, "out", ratio=0.5)
    assert len(found[stored]) == rows
    plain = [row for row in range(rows) if row != 35]  # 35 is <|eot|>, a token of the chat format
    expected = weights["cpt"][stored] + (weights["chat"][stored] - weights["base"][stored]) * 0.5
    assert torch.equal(found[stored][plain[:35]], expected[plain[:35]])

    embedding = 56 if build is mllama else 48
    write_tokenizer(tmp_path / "longer", "cpt")
    pieces = [NewPiece(id, f"n{id}", [3]) for id in range(embedding, embedding + 8)]
    VocabularyMap(embedding, embedding + 8, pieces, [], []).save(tmp_path / "longer")
    with pytest.raises(UserError, match=stored):
        resize_embeddings(
            EmbeddingsConfig(), tmp_path / "base", tmp_path / "longer", tmp_path / "r"
        )


def test_a_table_that_cannot_get_the_chat_model_s_tokens_is_named(tmp_path):
    make(mllama, tmp_path)
    fillers = [f"<f{number}>" for number in range(36, 56)]
    tokens = {
        "base": fillers[:-1], "cpt": fillers, "chat": [*fillers[:-1], "<|im_start|>"],
    }  # fmt: skip
    for name, added in tokens.items():
        path = tmp_path / name / "tokenizer.json"
        content = json.loads(path.read_text())
        first = content["added_tokens"][0]
        content["added_tokens"] += [
            {**first, "id": number, "content": token} for number, token in enumerate(added, 36)
        ]
        path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="48 rows where the embedding has 56, and cannot get rows"):
        merged(tmp_path, "out")


def test_a_text_section_without_vocab_size_gets_one(tmp_path):
    """Gemma-3 4B as published: without it, loaders take the default of the class."""
    make(gemma3, tmp_path)
    path = tmp_path / "base" / "config.json"
    config = json.loads(path.read_text())
    assert config["text_config"].pop("vocab_size") == 48
    path.write_text(json.dumps(config))
    assert read_rows(tmp_path / "base") == 48
    write_tokenizer(tmp_path / "longer", "cpt")
    VocabularyMap(48, 50, [], [], [48, 49]).save(tmp_path / "longer")
    resize_embeddings(
        EmbeddingsConfig(), tmp_path / "base", tmp_path / "longer", tmp_path / "resized"
    )
    model, loading = transformers.Gemma3ForConditionalGeneration.from_pretrained(
        tmp_path / "resized", output_loading_info=True
    )
    assert not any(loading.values())
    assert len(model.get_output_embeddings().weight) == model.config.text_config.vocab_size == 50


def test_processors_come_along_and_code_is_named(tmp_path, capsys):
    make(llava, tmp_path)
    settings = {
        "base": ["preprocessor_config.json", "video_preprocessor_config.json"],
        "chat": ["preprocessor_config.json", "processor_config.json", "modeling_own.py"],
        "cpt": ["preprocessor_config.json", "chat_template.json"],
    }  # fmt: skip
    for name, files in settings.items():
        for file in files:
            (tmp_path / name / file).write_text(json.dumps({"from": name}))
    merged(tmp_path, "out")
    origin = {
        path.name: json.loads(path.read_text())["from"]
        for path in (tmp_path / "out").glob("*processor_config.json")
    }
    assert origin == {
        "preprocessor_config.json": "cpt",
        "processor_config.json": "chat",
        "video_preprocessor_config.json": "base",
    }
    assert not list((tmp_path / "out").glob("*.py"))
    assert not (tmp_path / "out" / "chat_template.json").exists()
    assert "chat contains code that its model may need (modeling_own.py)" in capsys.readouterr().err

    write_tokenizer(tmp_path / "longer", "cpt")
    VocabularyMap(48, 50, [], [], [48, 49]).save(tmp_path / "longer")
    resized = tmp_path / "resized"
    resize_embeddings(EmbeddingsConfig(), tmp_path / "base", tmp_path / "longer", resized)
    weights = {name: v.float() for name, v in load(resized).items()}
    shards = [LocalShard(name, tuple(v.shape), 0, v) for name, v in weights.items()]
    export_shards(shards, resized, tmp_path / "longer", tmp_path / "cpt 2", Ranks())
    extract(tmp_path / "base", tmp_path / "chat", tmp_path / "vector")
    assert {p.name for p in resized.glob("*processor*")} == set(settings["base"])
    assert {p.name for p in (tmp_path / "cpt 2").glob("*processor*")} == set(settings["base"])
    assert {p.name for p in (tmp_path / "vector").glob("*processor*")} == set(settings["chat"][:2])


def test_a_text_model_gets_no_processors(tmp_path):
    family = make_family(tmp_path / "models")
    (family.chat / "preprocessor_config.json").write_text("{}")
    merge_directories(MergeConfig(), inputs_of(family.root), tmp_path / "out")
    assert not list((tmp_path / "out").glob("*processor*"))


@pytest.mark.parametrize("prefix", ["language_model.model.", "model."])
def test_the_same_tensors_under_other_prefixes(prefix, tmp_path, capsys):
    """A model that another version of transformers saved, or its text decoder alone."""
    weights = make(llava, tmp_path)
    expected = merged(tmp_path, "out", ratio=0.5)
    stored = next(name for name in weights["chat"] if "layers.0." in name and "vision" not in name)
    own = stored.partition("layers.0.")[0]
    other = "language_model.model." if own != "language_model.model." else "model.language_model."
    new = prefix if prefix != own else other
    for model in ("base", "chat"):
        text = {
            n: v for n, v in weights[model].items() if "vision" not in n and "projector" not in n
        }
        head = next(name for name in text if "lm_head" in name)
        renamed = {name.replace(own, new, 1): v for name, v in text.items() if name != head}
        renamed["lm_head.weight"] = text[head]
        save_file(renamed, tmp_path / model / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "chat" / "config.json").read_text())["text_config"]
    (tmp_path / "chat" / "config.json").write_text(json.dumps(config))
    found = merged(tmp_path, "renamed", ratio=0.5)
    assert all(torch.equal(found[name], values) for name, values in expected.items())
    assert "is taken as" in capsys.readouterr().err
    extract(tmp_path / "base", tmp_path / "chat", tmp_path / "vector")
