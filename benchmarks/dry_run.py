"""Training at real shapes without the hardware: what a rank holds, moves, reads and writes.

python -m benchmarks.dry_run                                        some minutes, no GPU
python -m benchmarks.dry_run --models LLaMA-2-70B --ranks 64,512 --settings bf16,full

See benchmarks.fake_ranks for how. The estimates of training/memory.py and the traffic of
cluster/scaling.py are compared with it; docs/scaling.md has the table.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from benchmarks.fake_ranks import Trace
    from cpt_merge.training.config import TrainingConfig

GB = 1e9
LENGTH = 4096
NODE = 8  # ranks of a replica in HSDP

_LLAMA_2 = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 32_000,
    "max_position_embeddings": 4096, "tie_word_embeddings": False,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "LLaMA-2-7B": {
        **_LLAMA_2, "hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32,
    },
    "LLaMA-2-13B": {
        **_LLAMA_2, "hidden_size": 5120, "intermediate_size": 13_824, "num_hidden_layers": 40,
        "num_attention_heads": 40, "num_key_value_heads": 40,
    },
    "LLaMA-2-70B": {
        **_LLAMA_2, "hidden_size": 8192, "intermediate_size": 28_672, "num_hidden_layers": 80,
        "num_attention_heads": 64, "num_key_value_heads": 8,
    },
    "Llama-3.1-8B": {
        **_LLAMA_2, "vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "max_position_embeddings": 131_072, "rope_theta": 500_000.0,
    },
    "Qwen3-30B-A3B": {
        "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"],
        "vocab_size": 151_936, "hidden_size": 2048, "intermediate_size": 6144,
        "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4,
        "head_dim": 128, "moe_intermediate_size": 768, "num_experts": 128,
        "num_experts_per_tok": 8, "norm_topk_prob": True, "tie_word_embeddings": False,
        "max_position_embeddings": 40_960, "rope_theta": 1_000_000.0,
    },
    "Gemma-3-4B": {
        "model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"],
        "mm_tokens_per_image": 256,
        "text_config": {
            "model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10_240,
            "num_hidden_layers": 34, "sliding_window": 1024,
        },
        "vision_config": {
            "model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304,
            "num_hidden_layers": 27, "num_attention_heads": 16, "image_size": 896,
            "patch_size": 14,
        },
    },
}  # fmt: skip
SETTINGS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "selective": {"activation_checkpointing": "selective"},
    "full": {"activation_checkpointing": "full"},
    "two sequences": {"micro_batch_size": 2},
    "two micro-batches": {},
    "pure-bf16": {"precision": "pure-bf16"},
    "vocabulary": {"phases": [{"train": "vocabulary"}]},
    "LoRA": {"lora": {}},
    "8-bit moments": {"optimizer": {"moments": "8bit"}},
    "HSDP": {"activation_checkpointing": "full"},
}
# What runs if nothing is chosen: every model, and every setting once
CHOSEN: list[tuple[str, int, str]] = [
    *(("LLaMA-2-7B", 8, setting) for setting in SETTINGS if setting != "HSDP"),
    ("LLaMA-2-7B", 64, "HSDP"),
    ("LLaMA-2-13B", 64, "selective"),
    ("LLaMA-2-70B", 512, "full"),
    ("Llama-3.1-8B", 64, "bf16"),
    ("Qwen3-30B-A3B", 64, "bf16"),
    ("Gemma-3-4B", 64, "bf16"),
]
HELD = (
    "model, setting", "ranks", "parameters", "gradients", "moments", "peak", "gathered", "reduced",
    "all-reduced", "reads", "checkpoint", "export",
)  # fmt: skip
COMPARED = (
    "model, setting", "ranks", "peak, traced", "peak, estimate", "error %", "traffic, traced",
    "traffic, model", "error %",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A configuration, what was traced on its first rank, and what the estimates say."""

    name: str
    ranks: int
    trace: Trace
    peak: float
    traffic: float

    @property
    def held(self) -> list[str]:
        """Cells of the first table, in GB."""
        found = self.trace
        pairs = [
            f"{_gb(least)}-{_gb(most)}"
            for least, most in zip(
                vars(found.last).values(), vars(found.held).values(), strict=True
            )
        ]
        moved = (found.traffic[kind] for kind in ("gather", "reduce", "all-reduce"))
        files = (found.read, found.checkpoint, found.export)
        numbers = [_gb(value) for value in (found.peak["Total"], *moved, *files)]
        return [self.name, str(self.ranks), *pairs, *numbers]

    @property
    def compared(self) -> list[str]:
        """Cells of the second table."""
        peak, traffic = self.trace.peak["Total"], sum(self.trace.traffic.values())
        return [
            self.name, str(self.ranks), _gb(peak), _gb(self.peak),
            f"{100 * (self.peak / peak - 1):+.1f}", _gb(traffic), _gb(self.traffic),
            f"{100 * (self.traffic / traffic - 1):+.2f}",
        ]  # fmt: skip


def main(models: str = "", ranks: str = "", settings: str = "") -> None:
    """Print both tables. What is given in lists replaces the default configurations."""
    with TemporaryDirectory() as folder:
        rows = list(traced(list(chosen(models, ranks, settings)), Path(folder)))
    held, compared = [row.held for row in rows], [row.compared for row in rows]
    print(f"\nGB of one rank, of the last and of the first one:\n\n{_table(HELD, held)}")
    print(f"\nGB, and errors of the estimates:\n\n{_table(COMPARED, compared)}")


def chosen(models: str, ranks: str, settings: str) -> Iterator[tuple[str, int, str]]:
    """The configurations (model, ranks, setting) of the options."""
    if not (models or ranks or settings):
        yield from CHOSEN
        return
    for name in models.split(",") if models else MODELS:
        for count in ranks.split(",") if ranks else ["8"]:
            for setting in settings.split(",") if settings else ["bf16"]:
                yield name, int(count), setting


def traced(configurations: list[tuple[str, int, str]], folder: Path) -> Iterator[Row]:
    """The rows, with a line of progress for each. `folder` gets files without content."""
    from benchmarks.fake_ranks import RankCase, trace_fake, write_shapes

    started = time.monotonic()
    for place, (name, ranks, setting) in enumerate(configurations, 1):
        model = folder / name
        if not model.is_dir():
            write_shapes(MODELS[name], model)
        config, replicas = configuration(setting, ranks), ranks // NODE if setting == "HSDP" else 1
        begun = time.monotonic()
        trace = trace_fake(RankCase(model, config, ranks, replicas))
        row = compare(f"{name}, {setting}", model, config, ranks, replicas, trace)
        now = time.monotonic()
        print(
            f"{place} of {len(configurations)}: {' | '.join(row.compared)}; "
            f"{now - begun:.0f} s, {now - started:.0f} s in all",
            flush=True,
        )
        yield row


def configuration(setting: str, ranks: int) -> TrainingConfig:
    """A setting on so many ranks, with sequences of `LENGTH`."""
    from cpt_merge.training.config import TrainingConfig

    changes = SETTINGS[setting]
    sequences = changes.get("micro_batch_size", 1) * (2 if setting == "two micro-batches" else 1)
    return TrainingConfig(
        tokens=10**9, sequence_length=LENGTH, global_batch_size=ranks * sequences,
        attention="flash", **changes,
    )  # fmt: skip


def compare(
    name: str, model: Path, config: TrainingConfig, ranks: int, replicas: int, trace: Trace
) -> Row:
    """A trace next to the estimates."""
    from cpt_merge.checkpoint.reader import Checkpoint
    from cpt_merge.cluster.scaling import StepTraffic, Workload
    from cpt_merge.training.memory import ModelShape, estimate_memory

    shape = ModelShape.of(Checkpoint.open(model), name, config.lora)
    work = Workload.of(config, ranks)
    setup = work.memory_setup(ranks // replicas)
    traffic = StepTraffic.of(shape, work, ranks // replicas, replicas)
    return Row(name, ranks, trace, estimate_memory(shape, setup).total, traffic.total)


def _gb(value: float) -> str:
    return f"{value / GB:.2f}"


def _table(titles: tuple[str, ...], rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(cells)} |" for cells in rows)])


if __name__ == "__main__":
    typer.run(main)
