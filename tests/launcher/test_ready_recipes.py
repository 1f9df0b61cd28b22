"""Each recipe that comes along fits the GPUs that it names, by the plan of a model of the true shape, and runs in
miniature with small models of its family."""

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from benchmarks.dry_run import MODELS
from benchmarks.fake_ranks import write_shapes
from cpt_merge.cluster.fit import fittings
from cpt_merge.cluster.plan import ClusterOptions
from cpt_merge.launcher.plan import show_plan
from cpt_merge.launcher.recipe import Recipe, load_recipe
from cpt_merge.launcher.sizes import extended_rows, read_shape
from cpt_merge.launcher.start import backend_asked
from tests.command_line import cpt_merge

ROOT = Path(__file__).parents[2]
LLAMA = MODELS["LLaMA-2-7B"]
SHAPES: dict[str, dict[str, Any]] = {
    "llama2-7b": LLAMA,
    "llama3.1-8b": MODELS["Llama-3.1-8B"],
    "lora-8b": MODELS["Llama-3.1-8B"],
    "gemma3-4b": MODELS["Gemma-3-4B"],
    "qwen3-30b-a3b": MODELS["Qwen3-30B-A3B"],
    "mistral-7b": {
        **LLAMA, "model_type": "mistral", "architectures": ["MistralForCausalLM"], "vocab_size": 32_768,
        "intermediate_size": 14_336, "num_key_value_heads": 8, "max_position_embeddings": 32_768,
        "sliding_window": None,
    },
    "qwen3-8b": {
        **LLAMA, "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "vocab_size": 151_936,
        "intermediate_size": 12_288, "num_hidden_layers": 36, "num_key_value_heads": 8, "head_dim": 128,
        "max_position_embeddings": 32_768,
    },
}  # fmt: skip
FILES = {"zh_cn": "zh_tw"}  # a small text in another Chinese will do
NAMED = re.compile(r"--gpu (\S+) --gpus (\d+)(?: --nodes (\d+))?")
READY = {
    path.stem: found
    for path in sorted((ROOT / "recipes").glob("*.yaml"))
    if (found := NAMED.search(path.read_text(encoding="utf-8")))
}


@cache
def shape_folder(root: Path, family: str) -> Path:
    write_shapes(SHAPES[family], root / family)
    return root / family


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stand-ins")


def small_text(recipe: Recipe, texts: Path) -> str:
    """The override that gives a recipe text from this machine."""
    sources = [
        f"{{path: {texts / FILES.get(source.language, source.language)}.jsonl, "
        f"language: {source.language}, weight: {source.weight}}}"
        for source in recipe.corpus.sources
    ]
    return f"corpus.sources=[{', '.join(sources)}]"


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name == "llama2-7b-ko" else pytest.mark.slow)
        for name in READY
    ],
)
def test_it_fits_the_gpus_that_it_names(
    name: str, stand_ins: Path, texts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    family = next(one for one in SHAPES if name.startswith(one))
    path, base = ROOT / "recipes" / f"{name}.yaml", shape_folder(stand_ins, family)
    text = small_text(load_recipe(path, []), texts)
    recipe = load_recipe(path, [f"models.base={base}", text])
    gpu, gpus, nodes = READY[name].groups(default="1")
    options = ClusterOptions(gpu, int(nodes), int(gpus) // int(nodes))
    shape = read_shape(recipe)
    shape = shape.resized(extended_rows(recipe, shape))
    backend_asked(recipe, int(gpus))
    as_it_is = next(fittings(shape, recipe.training, options.cluster))
    assert as_it_is.overrides == []
    assert recipe.training.tokens / as_it_is.tokens_per_second < 4 * 86_400, "four days"
    show_plan(recipe, options)
    assert "tokens per second" in capsys.readouterr().out


def test_every_recipe_but_the_demo_and_the_template_names_its_gpus() -> None:
    there = {path.stem for path in (ROOT / "recipes").glob("*.yaml")}
    assert there - READY.keys() == {"demo", "local-template", "smollm2-135m-zh_tw"}


@pytest.mark.slow
@pytest.mark.parametrize("name", [*READY, "local-template"])
def test_it_runs_in_miniature(name: str, pair: Path, texts: Path, tmp_path: Path) -> None:
    """Its keys, on the smallest Llama pair; tests/launcher runs pipelines of the other families."""
    recipe = load_recipe(ROOT / "recipes" / f"{name}.yaml", [])
    pieces = dict.fromkeys(recipe.tokenizer.new_pieces, 40)
    step = 64 * 4
    phases = [
        f"training.phases.{place}.tokens={2 * step}"
        for place, phase in enumerate(recipe.training.phases)
        if phase.tokens
    ]
    done = cpt_merge(
        "run", ROOT / "recipes" / f"{name}.yaml", f"runs={tmp_path}", small_text(recipe, texts),
        f"models={{base: {pair / 'base'}, chat: {pair / 'chat'}}}", f"tokenizer.new_pieces={pieces}", *phases,
        "corpus.heldout=0.1", "training.sequence_length=64", "training.global_batch_size=4",
        f"training.tokens={8 * step}", "training.evaluate_sequences=4", "evaluation.max_prompts=1",
        "evaluation.max_new_tokens=4", "tracking.mode=disabled", "training.precision=fp32",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / name / "merge" / "chat" / "config.json").is_file()
