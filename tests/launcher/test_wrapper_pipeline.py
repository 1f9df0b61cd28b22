"""A multimodal pair through the command line: as it is, and as a text model of its own."""

import json
import shutil
from pathlib import Path

import pytest
import sentencepiece
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Gemma3ForConditionalGeneration

from tests.command_line import cpt_merge
from tests.launcher.conftest import TEMPLATE, write_recipe, write_tokenizer
from tests.wrappers import make_wrapper

SETTINGS = {
    "tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
    "add_bos_token": True, "legacy": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def wrapper_recipe(tmp_path_factory: pytest.TempPathFactory, texts: Path) -> Path:
    """A recipe over a pair of Gemma-3 wrappers."""
    folder = tmp_path_factory.mktemp("wrapper")
    for name, seed in (("base", 0), ("chat", 1)):
        model = folder / name
        model.mkdir()
        write_tokenizer(model)
        proto = sentencepiece.SentencePieceProcessor(model_file=str(model / "tokenizer.model"))
        template = {"chat_template": TEMPLATE} if name == "chat" else {}
        (model / "tokenizer_config.json").write_text(json.dumps({**SETTINGS, **template}))
        (model / "preprocessor_config.json").write_text('{"size": 8}')
        make_wrapper(model, "gemma3", False, seed, proto.vocab_size())
    path = write_recipe(folder, folder, texts)
    values = yaml.safe_load(path.read_text())
    preview = {"every": 3, "prompts": 1, "max_new_tokens": 4}
    values["training"] |= {"preview": preview}
    path.write_text(yaml.safe_dump(values, allow_unicode=True))
    return path


@pytest.mark.slow
def test_the_plan_tells_towers_from_what_is_trained(wrapper_recipe: Path) -> None:
    base = load_file(wrapper_recipe.parent / "base" / "model.safetensors")
    text = sum(v.numel() for n, v in base.items() if n.startswith("language_model"))
    towers = sum(v.numel() for v in base.values()) - text
    lines = cpt_merge("plan", wrapper_recipe).stdout.splitlines()
    rows = {line.split("  ")[0]: " ".join(line.split()[1:]) for line in lines}
    assert rows["base"].startswith(f"{text / 1e6:,.1f} M parameters,")
    assert rows["towers"] == f"{towers / 1e6:,.1f} M parameters more, which training does not load"


@pytest.mark.slow
def test_the_plan_of_a_text_model_has_no_towers(wrapper_recipe: Path) -> None:
    done = cpt_merge("plan", wrapper_recipe, "models.text_only=true")
    assert done.returncode == 0, done.stderr
    assert "towers are left out of CPT and of the merged model" in done.stdout
    assert "stay CPT's" not in done.stderr


@pytest.mark.slow
def test_a_wrapper_and_its_text_model_are_trained_merged_and_evaluated_alike(
    wrapper_recipe: Path,
) -> None:
    root = wrapper_recipe.parent
    for name, override in (("tiny", "models.text_only=false"), ("alone", "models.text_only=true")):
        done = cpt_merge("run", wrapper_recipe, f"name={name}", override)
        assert done.returncode == 0, done.stderr
    base = load_file(root / "base" / "model.safetensors")
    towers = {name for name in base if not name.startswith("language_model")}
    for result in ("training/cpt", "merge/chat"):
        whole, alone = (root / "runs" / name / result for name in ("tiny", "alone"))
        found, text = load_file(whole / "model.safetensors"), load_file(alone / "model.safetensors")
        assert found.keys() == base.keys()
        assert all(torch.equal(found[name], base[name]) for name in towers)
        assert text.keys() == {n.removeprefix("language_model.") for n in found.keys() - towers}
        for name, values in text.items():
            assert torch.equal(values, found[f"language_model.{name}"]), name
        assert (whole / "preprocessor_config.json").is_file()
        assert not (alone / "preprocessor_config.json").exists()
        for loader, place in (
            (Gemma3ForConditionalGeneration, whole),
            (AutoModelForCausalLM, alone),
        ):
            _, loading = loader.from_pretrained(place, output_loading_info=True)
            assert not any(loading.values())
    results = [
        json.loads((root / "runs" / name / "evaluation" / "results.json").read_text())["models"]
        for name in ("tiny", "alone")
    ]
    for of_model in (model for of_run in results for model in of_run.values()):
        del of_model["directory"], of_model["generated_tokens_per_second"]
    assert results[0] == results[1]
    assert (root / "runs" / "tiny" / "training" / "preview.jsonl").is_file()
    shutil.rmtree(root / "runs" / "tiny" / "merge")  # made by the hook; now from files
    hook = load_file(root / "runs" / "alone" / "merge" / "chat" / "model.safetensors")
    done = cpt_merge("merge", wrapper_recipe)
    assert done.returncode == 0, done.stderr
    files = load_file(root / "runs" / "tiny" / "merge" / "chat" / "model.safetensors")
    assert all(torch.equal(v, files[f"language_model.{name}"]) for name, v in hook.items())
    swept = cpt_merge("sweep", wrapper_recipe, "sweep.ratios=[0, 1]")
    assert swept.returncode == 0, swept.stderr
