"""Small models as transformers saves them, and edits that make them look like published ones."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

ROWS = 96  # of the vocabulary


def save_model(directory: Path, model_type: str, seed: int = 0, **settings) -> Path:
    """A small bfloat16 model of a family."""
    common = {
        "vocab_size": ROWS, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    config = AutoConfig.for_model(model_type, **{**common, **settings})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(directory)
    return directory


def edit_weights(directory: Path, change) -> None:
    """Change the tensors of a checkpoint of one file."""
    path = directory / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(
        {name: values.contiguous() for name, values in weights.items()}, path, {"format": "pt"}
    )


def edit_config(directory: Path, **fields) -> None:
    """Set fields of config.json."""
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def block_fp8(weight: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights in F8_E4M3, and the scale of each block, of which the last may be smaller."""
    down, across = (-(-size // length) for size, length in zip(weight.shape, block, strict=True))
    stored, scales = torch.empty(weight.shape, dtype=torch.float8_e4m3fn), torch.empty(down, across)
    for row in range(down):
        for column in range(across):
            here = (
                slice(row * block[0], (row + 1) * block[0]),
                slice(column * block[1], (column + 1) * block[1]),
            )
            scales[row, column] = weight[here].float().abs().max() / 448
            stored[here] = (weight[here].float() / scales[row, column]).to(torch.float8_e4m3fn)
    return stored, scales


def to_block_fp8(directory: Path, block: tuple[int, int]) -> None:
    """As DeepSeek and Qwen publish: the layers' matrices in blocks, the rest as it is."""

    def change(weights):
        for name in [name for name in weights if "_proj" in name]:
            weights[name], weights[f"{name}_scale_inv"] = block_fp8(weights[name], block)

    edit_weights(directory, change)
    edit_config(
        directory,
        quantization_config={
            "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
            "weight_block_size": list(block),
        },
    )  # fmt: skip


def to_mxfp4(directory: Path, seed: int = 3) -> None:
    """As gpt-oss is published: random values for the experts."""
    random = torch.Generator().manual_seed(seed)

    def change(weights):
        for name in [name for name in weights if name.endswith(("gate_up_proj", "down_proj"))]:
            experts, rows, columns = weights.pop(name).shape
            groups = (experts, columns, rows // 32)
            weights[f"{name}_blocks"] = torch.randint(
                0, 256, (*groups, 16), generator=random, dtype=torch.uint8
            )
            weights[f"{name}_scales"] = torch.randint(
                112, 124, groups, generator=random, dtype=torch.uint8
            )

    edit_weights(directory, change)
    edit_config(directory, quantization_config={"quant_method": "mxfp4"})
