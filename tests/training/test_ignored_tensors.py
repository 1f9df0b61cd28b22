"""Tensors that no model class loads or trains, through the whole pipeline."""

import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from cpt_merge.checkpoint.export import LocalShard
from cpt_merge.checkpoint.reader import Checkpoint
from cpt_merge.checkpoint.vocabulary_map import VocabularyMap
from cpt_merge.merge import MergeConfig
from cpt_merge.merge.files import merge_directories
from cpt_merge.merge.hook import merge_shards
from cpt_merge.merge.plan import MergeInputs
from cpt_merge.tokenizer_ext import EmbeddingsConfig
from cpt_merge.tokenizer_ext.embeddings.resize import resize_embeddings
from cpt_merge.tracking import Tracker
from cpt_merge.training.config import TrainingConfig
from cpt_merge.training.distributed.parallel import Parallel
from cpt_merge.training.inputs import TrainingInputs
from cpt_merge.training.run import run
from tests.distributed import run_ranks
from tests.training.conftest import CONFIG

ROWS = 301
SIZES = {
    "vocab_size": ROWS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None,
}  # fmt: skip
MASK = torch.ones(1, 1, 128, 128).tril()


def in_layers(prefix: str, **tensors: torch.Tensor) -> dict[str, torch.Tensor]:
    return {
        f"{prefix}.{layer}.{name.replace('__', '.')}": values.clone()
        for layer in (0, 1)
        for name, values in tensors.items()
    }


# configuration, what is stored in addition, and the beginning of a name that published files omit
PUBLISHED = {
    "gpt-neox": (
        transformers.GPTNeoXConfig(**SIZES),
        in_layers("gpt_neox.layers", attention__bias=MASK.bool(), attention__masked_bias=torch.tensor(-torch.inf),
                  attention__rotary_emb__inv_freq=torch.arange(4.0)),
        "",
    ),
    "gpt2": (
        transformers.GPT2Config(vocab_size=ROWS, n_embd=32, n_layer=2, n_head=4, n_positions=128, bos_token_id=0, eos_token_id=1),
        in_layers("h", attn__bias=MASK, attn__masked_bias=torch.tensor(-1e4)),
        "transformer.",
    ),
    "llama": (
        transformers.LlamaConfig(**SIZES),
        {**in_layers("model.layers", self_attn__rotary_emb__inv_freq=torch.arange(4.0)),
         "mtp.fc.weight": torch.zeros(32, 64), "model.layers.2.eh_proj.weight": torch.zeros(32, 64),
         "model.layers.2.embed_tokens.weight": torch.zeros(ROWS, 32),
         "model.layers.2.shared_head.head.weight": torch.zeros(ROWS, 32)},
        "",
    ),
    "apertus": (transformers.ApertusConfig(**{**SIZES, "hidden_act": "xielu"}), {}, ""),  # buffers that are stored
    "gemma3": (
        transformers.Gemma3Config(
            vision_config={"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 6, "num_attention_heads": 2,
                           "image_size": 8, "patch_size": 4},
            text_config={**SIZES, "head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]},
            mm_tokens_per_image=4,
        ), {}, ""),
}  # fmt: skip


def publish(family: str, folder: Path, tokenizer: Path, shift: float) -> None:
    """A model in the layout in which its family is published."""
    config, more, omitted = PUBLISHED[family]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += shift * torch.randn_like(parameter)
    model.save_pretrained(folder)
    weights = {
        name.removeprefix(omitted): v for name, v in load_file(folder / "model.safetensors").items()
    }
    save_file({**weights, **more}, folder / "model.safetensors", {"format": "pt"})
    for file in tokenizer.glob("*token*"):
        shutil.copy(file, folder)


def train_and_merge(root: Path) -> None:
    models = MergeInputs(root / "resized", root / "base", root / "chat", root / "longer")

    def hook(shards: list[LocalShard], parallel: Parallel) -> None:
        merge_shards(shards, MergeConfig(ratio=0.5), models, root / "hook", Tracker(), parallel)

    config = TrainingConfig(**{**CONFIG, "tokens": 32 * 8 * 2, "checkpoints": {"every": 2}})
    inputs = TrainingInputs(root / "resized", root / "longer", root / "store", "key")
    run(
        config,
        inputs,
        root / "out",
        Tracker([], {"mode": "disabled", "run_id": "id", "group": "g"}),
        hook,
    )


@pytest.mark.parametrize("family", PUBLISHED)
def test_a_published_layout_goes_through_the_pipeline(
    family: str, tmp_path: Path, model: Path, store: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(store, tmp_path / "store")
    for name, shift in (("base", 0.0), ("chat", 0.02)):
        publish(family, tmp_path / name, model, shift)
    (tmp_path / "longer").mkdir()
    for file in model.glob("*token*"):
        shutil.copy(file, tmp_path / "longer")
    VocabularyMap(ROWS, ROWS + 3, [], [], [ROWS, ROWS + 1, ROWS + 2]).save(tmp_path / "longer")

    resize_embeddings(
        EmbeddingsConfig(), tmp_path / "base", tmp_path / "longer", tmp_path / "resized"
    )
    more = PUBLISHED[family][1]
    assert (f"left out {len(more)} tensors (" in capfd.readouterr().err) == bool(more)
    run_ranks(train_and_merge, 1, tmp_path)
    inputs = MergeInputs(
        tmp_path / "out" / "cpt", tmp_path / "base", tmp_path / "chat", tmp_path / "longer"
    )
    merge_directories(MergeConfig(ratio=0.5), inputs, tmp_path / "files")

    hook, files = (load_file(tmp_path / name / "model.safetensors") for name in ("hook", "files"))
    published = load_file(tmp_path / "base" / "model.safetensors")
    assert set(hook) == set(files) == published.keys() - more.keys()
    assert all(torch.equal(values, hook[name]) for name, values in files.items())
    architecture = getattr(
        transformers, Checkpoint.open(tmp_path / "base").config["architectures"][0]
    )
    for name in ("out/cpt", "hook", "files"):
        _, loading = architecture.from_pretrained(tmp_path / name, output_loading_info=True)
        assert not loading["missing_keys"]
        assert not loading["unexpected_keys"]
