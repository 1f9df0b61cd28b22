"""Models whose files hold experts one by one merge with those that hold them together."""

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from cpt_merge.core.errors import UserError
from cpt_merge.merge import MergeConfig
from cpt_merge.merge.extract import extract
from cpt_merge.merge.files import merge_directories
from cpt_merge.merge.fit import open_fitting
from cpt_merge.merge.plan import MergeInputs
from cpt_merge.tracking import Tracker
from tests.merge.conftest import write_tokenizer
from tests.merge.test_families import SMALL

MODELS = ("cpt", "base", "chat")
EXPERTS = {
    "mixtral": ("MixtralConfig", {"num_local_experts": 3}),
    "qwen3-moe": ("Qwen3MoeConfig", {"num_experts": 3, "moe_intermediate_size": 16, "num_experts_per_tok": 2}),
}  # fmt: skip


def build(folder: Path, family: str, seed: int, **changes: Any) -> None:
    """The same model twice: `one-by-one`, as it is published, and `together`, as it is in memory."""
    name, more = EXPERTS[family]
    torch.manual_seed(seed)
    config = getattr(transformers, name)(**{**SMALL, **more, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config).bfloat16()
    for layout in ("one-by-one", "together"):
        model.save_pretrained(folder / layout, save_original_format=layout == "one-by-one")
        write_tokenizer(folder / layout, "base")


@pytest.fixture(scope="module", params=list(EXPERTS))
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experts")
    for seed, name in enumerate(MODELS):
        build(folder / name, request.param, seed)
    stored = load_file(folder / "base" / "one-by-one" / "model.safetensors")
    together = load_file(folder / "base" / "together" / "model.safetensors")
    assert len(stored) > len(together), "the two layouts differ"
    return folder


def merged(
    models: Path, layouts: tuple[str, ...], out: Path, **config: Any
) -> dict[str, torch.Tensor]:
    cpt, base, chat = (models / name / layout for name, layout in zip(MODELS, layouts, strict=True))
    merge_directories(MergeConfig(**config), MergeInputs(cpt, base, chat, cpt), out, Tracker())
    return load_file(out / "model.safetensors")


@pytest.mark.parametrize("cpt", ["one-by-one", "together"])
@pytest.mark.parametrize(
    "config",
    [{"ratio": 0.7}, {"method": "ties", "density": 0.4}, {"method": "dare", "density": 0.4}],
)
def test_every_combination_gives_the_bytes_of_one_layout(
    cpt: str, config: dict[str, Any], models: Path, tmp_path: Path
) -> None:
    expected = merged(models, (cpt, cpt, cpt), tmp_path / "one", **config)
    for number, layouts in enumerate(itertools.product(["one-by-one", "together"], repeat=2)):
        found = merged(models, (cpt, *layouts), tmp_path / f"mixed-{number}", **config)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], values) for name, values in expected.items()), layouts


@pytest.mark.parametrize("cpt", ["one-by-one", "together"])
def test_an_extracted_vector_may_be_of_the_other_layout(
    cpt: str, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = "together" if cpt == "one-by-one" else "one-by-one"
    expected = merged(models, (cpt, cpt, cpt), tmp_path / "one", statistics="all")
    norms = re.findall(r"\|chat - base\| is \S+ of \|base\|", capsys.readouterr().err)
    extract(models / "base" / other, models / "chat" / other, tmp_path / "vector")
    inputs = MergeInputs(models / "cpt" / cpt, vector=tmp_path / "vector")
    merge_directories(MergeConfig(statistics="all"), inputs, tmp_path / "two", Tracker())
    found = load_file(tmp_path / "two" / "model.safetensors")
    assert all(torch.equal(found[name], values) for name, values in expected.items())
    assert (
        norms[-1:]
        == re.findall(r"\|chat - base\| is \S+ of \|base\|", capsys.readouterr().err)[-1:]
    )


def test_the_conversion_is_said(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    open_fitting({"base": models / "base" / "one-by-one", "chat": models / "chat" / "together"})
    said = capsys.readouterr().err
    assert re.search(r"(4|6) tensors of .* are made of (18|20) tensors here, as trans", said)


@pytest.mark.parametrize("layouts", itertools.product(["one-by-one", "together"], repeat=2))
def test_other_numbers_of_experts_are_one_sentence(
    layouts: tuple[str, str], tmp_path: Path
) -> None:
    build(tmp_path / "base", "qwen3-moe", 0)
    build(tmp_path / "chat", "qwen3-moe", 1, num_experts=4)
    with pytest.raises(
        UserError, match="3 experts a layer in base, 4 experts a layer in chat"
    ) as error:
        open_fitting(
            {
                name: tmp_path / name / layout
                for name, layout in zip(("base", "chat"), layouts, strict=True)
            }
        )
    assert "is missing" not in str(error.value)
    assert "has shapes" not in str(error.value)


@pytest.mark.parametrize("layouts", itertools.product(["one-by-one", "together"], repeat=2))
def test_a_router_that_is_missing_is_named(
    layouts: tuple[str, str], models: Path, tmp_path: Path
) -> None:
    base, chat = (models / name / layout for name, layout in zip(MODELS[1:], layouts, strict=True))
    stored = load_file(chat / "model.safetensors")
    router = next(name for name in stored if name.endswith("gate.weight"))
    del stored[router]
    lacking = tmp_path / "chat"
    lacking.mkdir()
    for file in chat.iterdir():
        (lacking / file.name).write_bytes(file.read_bytes())
    save_file(stored, lacking / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"gate\.weight is missing in chat\.$"):
        open_fitting({"base": base, "chat": lacking})
