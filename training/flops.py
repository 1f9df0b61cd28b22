"""Model FLOPs: of a token by formula, of a GPU by its datasheet, and the share (MFU)."""

from __future__ import annotations

import re
from typing import Any

from cpt_merge.core.errors import UserError
from cpt_merge.core.progress import say

TERA = 1e12

# Dense bf16 TFLOP/s with fp32 accumulation. Datasheets that print the number "with sparsity" are
# halved. A key's words must all be in the device's name; the key with the most words wins. AMD:
# MI250X is two devices, each half of the card.
PEAKS: dict[str, float] = {
    "A100": 312.0,  # NVIDIA A100 datasheet; SXM and PCIe alike
    "A800": 312.0,  # A100 with less NVLink
    "A30": 165.0,  # NVIDIA A30 datasheet
    "A40": 149.7,  # NVIDIA A40 datasheet: 149.7 | 299.4 sparse
    "A10": 125.0,  # NVIDIA A10 datasheet: 125 | 250 sparse
    "A10G": 70.0,  # AWS G5: 140 sparse
    "A6000": 154.8,  # NVIDIA RTX A6000 datasheet: 309.7 sparse
    "H100": 989.4,  # NVIDIA H100 datasheet, SXM: 1,979 sparse
    "H100 PCIE": 756.5,  # the same, PCIe: 1,513 sparse
    "H100 NVL": 835.5,  # the same, NVL: 1,671 sparse
    "H800": 989.4,  # H100 SXM with less NVLink
    "H800 PCIE": 756.5,
    "H20": 148.0,  # NVIDIA H20 datasheet
    "H200": 989.4,  # NVIDIA H200 datasheet, SXM: 1,979 sparse
    "H200 NVL": 835.5,  # the same, NVL: 1,671 sparse
    "GH200": 989.4,  # NVIDIA GH200 datasheet: 1,979 sparse
    "B200": 2250.0,  # NVIDIA HGX B200 datasheet: 4.5 PFLOP/s sparse
    "GB200": 2500.0,  # NVIDIA GB200 NVL72 datasheet: 10 PFLOP/s sparse for two GPUs
    "L4": 121.0,  # NVIDIA L4 datasheet: 242 sparse
    "L40": 181.0,  # NVIDIA L40 datasheet: 181.05 | 362.1 sparse
    "L40S": 362.0,  # NVIDIA L40S datasheet: 362.05 | 733 sparse
    "RTX 6000 ADA": 364.2,  # NVIDIA Ada professional GPU whitepaper
    "RTX 3090": 71.0,  # NVIDIA GA102 whitepaper, fp32 accumulation
    "RTX 3090 TI": 80.0,
    "RTX 4080": 97.5,  # NVIDIA Ada GPU architecture whitepaper, fp32 accumulation
    "RTX 4090": 165.2,  # the same
    "RTX 5090": 209.5,  # NVIDIA RTX Blackwell whitepaper, fp32 accumulation
    "MI210": 181.0,  # AMD MI210 datasheet
    "MI250X": 191.5,  # AMD MI250X datasheet: 383 for the card
    "MI250": 181.05,  # AMD MI250 datasheet: 362.1 for the card
    "MI300A": 980.6,  # AMD MI300A datasheet
    "MI300X": 1307.4,  # AMD MI300X datasheet
    "MI325X": 1307.4,  # AMD MI325X datasheet
    "MI350X": 2300.0,  # AMD MI350X datasheet
    "MI355X": 2500.0,  # AMD MI355X datasheet
}

# A name with one of these that is not in the key is another, slower device: a part of a GPU, or
# another chip.
OTHERS = {"MIG", "LAPTOP", "MOBILE", "MAX", "TI", "SUPER", "D", "PCIE", "NVL"}
ALIKE = {"A100", "A800", "A30", "A40", "A10"}  # sold on PCIe at the same peak


_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_TAKEN = (
    "num_experts_per_tok", "num_experts_per_token", "num_selected_experts", "top_k_experts",
    "moe_top_k", "moe_topk", "moe_k",
)  # fmt: skip


def peak_flops(device_name: str) -> float:
    """Dense bf16 FLOP/s of a GPU, by torch's name for it. Raises `UserError` for an unknown GPU."""
    words = set(re.split(r"[^A-Z0-9]+", device_name.upper()))
    known = [key for key in PEAKS if set(key.split()) <= words]
    key = max(known, key=lambda name: len(name.split()), default="")
    others = (words & OTHERS) - set(key.split()) - ({"PCIE"} if key in ALIKE else set())
    if not key or others:
        raise UserError(
            f"the peak of the GPU {device_name!r} is not known (training/flops.py); "
            "set training.peak_tflops to its dense bf16 TFLOP/s."
        )
    return PEAKS[key] * TERA


def flops_per_token(
    config: Any, parameters: int, sequence_length: int, frozen: int = 0
) -> float | None:
    """FLOPs that training takes per token, forward and backward.

    `config` is the transformers configuration, `parameters` the number of parameters that a token
    uses (of experts, those that it is sent to), with a tied matrix counted once; `frozen` of them,
    all outside the embedding, have no gradient.

        6 * (parameters - input embedding) - 2 * frozen + 12 * layers * heads * head_dim * length

    (Chowdhery et al., PaLM, 2022, appendix B; torchtitan counts alike.) A matrix costs 2 FLOPs per
    parameter forward, 2 for the gradient of its input and 2 for its own, which a frozen one does
    not need. The input embedding is a look-up; where it is tied to the head, the head counts.
    Attention counts as if every token saw the whole sequence, without discount for causality,
    documents or sliding windows; recomputation does not count. None, with a message, for models
    that the formula does not describe.
    """
    config = config.get_text_config()
    if not getattr(config, "num_attention_heads", None):
        say(
            "MFU is not reported: the formula is for attention models, "
            f"and {type(config).__name__} names no heads."
        )
        return None
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    lookup = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    attention = 12 * config.num_hidden_layers * width * sequence_length
    return float(6 * (parameters - lookup) - 2 * frozen + attention)


def experts(config: Any) -> int:
    """Experts of a layer, under any of the names in configurations; 0 for a dense model."""
    return max(int(getattr(config, name, None) or 0) for name in _EXPERTS)


def experts_taken(config: Any) -> float | None:
    """Experts that a token is sent to in a layer, the mean over layers; None if nothing says so."""
    found = [getattr(config, name, None) for name in _TAKEN]
    known = [value for value in found if value]
    if not known:
        return None
    of_layers = known[0] if isinstance(known[0], list) else [known[0]]
    return sum(of_layers) / len(of_layers)


def mfu(tokens_per_second_per_device: float, flops: float, peak: float) -> float:
    """Model FLOPs utilisation, 0 .. 1: FLOP/s by formula over the device's peak (`peak_flops`)."""
    return tokens_per_second_per_device * flops / peak
