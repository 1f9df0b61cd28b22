"""A mixture of experts through the command line; the chat model's files hold the experts together."""

import json
import shutil
from pathlib import Path

import pytest
import sentencepiece
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from tests.command_line import cpt_merge
from tests.launcher.conftest import TEMPLATE, write_recipe, write_tokenizer
from tests.launcher.test_wrapper_pipeline import SETTINGS


@pytest.fixture(scope="module")
def expert_recipe(tmp_path_factory: pytest.TempPathFactory, texts: Path) -> Path:
    """A recipe over a pair in bfloat16, with previews."""
    folder = tmp_path_factory.mktemp("experts")
    for name, seed in (("base", 0), ("chat", 1)):
        model = folder / name
        model.mkdir()
        write_tokenizer(model)
        rows = sentencepiece.SentencePieceProcessor(model_file=str(model / "tokenizer.model"))
        template = {"chat_template": TEMPLATE} if name == "chat" else {}
        (model / "tokenizer_config.json").write_text(json.dumps({**SETTINGS, **template}))
        torch.manual_seed(seed)
        config = Qwen3MoeConfig(
            vocab_size=rows.vocab_size(), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=512,
            num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        of_pair = Qwen3MoeForCausalLM(config).to(torch.bfloat16)
        of_pair.save_pretrained(model, save_original_format=name == "base")
    path = write_recipe(folder, folder, texts)
    values = yaml.safe_load(path.read_text())
    values["training"] |= {"preview": {"every": 3, "prompts": 1, "max_new_tokens": 4}}
    path.write_text(yaml.safe_dump(values, allow_unicode=True))
    return path


@pytest.mark.slow
def test_all_stages_keep_the_names_of_the_base(expert_recipe: Path) -> None:
    root = expert_recipe.parent
    base = load_file(root / "base" / "model.safetensors")
    assert base.keys() != load_file(root / "chat" / "model.safetensors").keys()
    planned = cpt_merge("plan", expert_recipe)
    assert planned.returncode == 0, planned.stderr
    assert "4 in a layer, of which a token uses 2" in planned.stdout
    done = cpt_merge("run", expert_recipe)
    assert done.returncode == 0, done.stderr
    merged = root / "runs" / "tiny" / "merge" / "chat"
    hook = load_file(merged / "model.safetensors")
    assert hook.keys() == base.keys()
    assert (
        load_file(root / "runs" / "tiny" / "training" / "cpt" / "model.safetensors").keys()
        == base.keys()
    )
    _, loading = AutoModelForCausalLM.from_pretrained(merged, output_loading_info=True)
    assert not any(loading.values())
    shutil.rmtree(merged.parent)  # made by the hook; now from files
    again = cpt_merge("merge", expert_recipe)
    assert again.returncode == 0, again.stderr
    files = load_file(merged / "model.safetensors")
    for name, values in hook.items():  # of fp32 masters and not of CPT in bfloat16
        torch.testing.assert_close(files[name], values, rtol=2**-6, atol=2**-10, msg=name)
    swept = cpt_merge("sweep", expert_recipe, "sweep.ratios=[0, 1]")
    assert swept.returncode == 0, swept.stderr


@pytest.mark.slow  # tests/merge/test_expert_layouts.py has the sentence
def test_a_chat_model_with_other_experts_is_refused_before_the_first_stage(
    expert_recipe: Path, tmp_path: Path
) -> None:
    chat = tmp_path / "chat"
    shutil.copytree(expert_recipe.parent / "chat", chat)
    config = json.loads((chat / "config.json").read_text())
    AutoModelForCausalLM.from_config(
        Qwen3MoeConfig(**{**config, "num_local_experts": 6})
    ).save_pretrained(chat)
    refused = cpt_merge("run", expert_recipe, f"models.chat={chat}", "name=refused")
    assert refused.returncode == 2
    assert "4 experts a layer in base, 6 experts a layer in chat" in refused.stderr
    assert not (expert_recipe.parent / "runs" / "refused" / "tokenizer" / "stage.json").exists()
