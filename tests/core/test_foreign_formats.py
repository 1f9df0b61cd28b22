"""What is no checkpoint is recognised."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cpt_merge.checkpoint.reader import Checkpoint
from cpt_merge.core.errors import UserError
from cpt_merge.core.hub import model_directory

FOLDERS = [
    (["train_state.json", "shards/.metadata"], "training checkpoint", "cpt-merge export"),
    (["step-00000200/train_state.json"], "training checkpoints", "cpt-merge export"),
    (["latest", "zero_to_fp32.py", "global_step9/mp_rank_00_model_states.pt"], "DeepSpeed",
     "zero_to_fp32.py"),
    (["mp_rank_00_model_states.pt"], "DeepSpeed", "zero_to_fp32.py"),
    ([".metadata", "__0_0.distcp"], "DCP", "accelerate merge-weights"),
    (["pytorch_model_fsdp_0/__0_0.distcp"], "DCP", "accelerate merge-weights"),
    (["model-Q4_K_M.gguf"], "GGUF", "gguf_file='model-Q4_K_M.gguf'"),
    (["consolidated.safetensors", "params.json"], "Mistral", "convert_mistral"),
    (["consolidated.00.pth", "params.json"], "Meta", "convert_llama"),
    (["iter_0000100/mp_rank_00/model_optim_rng.pt"], "Megatron", "Megatron-Bridge"),
    (["llama-3-8b.safetensors"], "llama-3-8b.safetensors", "mv "),
    (["model-00001-of-00002.safetensors"], "without model.safetensors.index.json", "again"),
]  # fmt: skip


@pytest.mark.parametrize("config", [True, False])
@pytest.mark.parametrize(("files", "what", "how"), FOLDERS)
def test_a_folder_of_another_format(
    tmp_path: Path, files: list[str], what: str, how: str, config: bool
) -> None:
    for name in [*files, *(["config.json"] if config else [])]:
        path = tmp_path / "model" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    with pytest.raises(UserError) as caught:
        Checkpoint.open(model_directory(str(tmp_path / "model")))
    assert what in str(caught.value)
    assert how in str(caught.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("llama.gguf", ("GGUF", "gguf_file='llama.gguf'")),
        ("llama.safetensors", ("single file", "config.json")),
        ("notes.txt", ("is a file", "directory")),
    ],
)
def test_a_file_is_not_missing(tmp_path: Path, name: str, words: tuple[str, str]) -> None:
    path = tmp_path / name
    path.write_text("x")
    for read in (lambda: model_directory(str(path)), lambda: Checkpoint.open(path)):
        with pytest.raises(UserError) as caught:
            read()
        assert all(word in str(caught.value) for word in words)
        assert "not exist" not in str(caught.value)


def test_what_zero_3_leaves_of_a_model(tmp_path: Path) -> None:
    save_file({"a.weight": torch.zeros(0)}, tmp_path / "model.safetensors")
    assert Checkpoint.open(tmp_path).info("a.weight").size == 0
    (tmp_path / "zero_to_fp32.py").touch()
    with pytest.raises(UserError, match=r"a.weight without elements.* run `python .*zero_to_fp32"):
        Checkpoint.open(tmp_path)


def test_a_file_of_a_model_names_its_directory(tmp_path: Path) -> None:
    for name in ("model.safetensors", "config.json"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match=f"give its directory, {tmp_path}"):
        model_directory(str(tmp_path / "model.safetensors"))
