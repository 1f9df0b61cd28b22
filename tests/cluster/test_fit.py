"""`cpt-merge plan --gpu NAME --fit`: what makes a run fit a GPU's memory."""

from typing import Any

import pytest
import yaml
from rich.console import Console

from benchmarks.published import LLAMA_2_7B, LLAMA_2_70B
from cpt_merge.cluster.fit import Fitting, fittings, shortest, show_fit
from cpt_merge.cluster.plan import ClusterOptions
from cpt_merge.cluster.scaling import GIGA, RESERVE, Cluster, Workload, estimate_step, memory_on
from cpt_merge.core.errors import UserError
from cpt_merge.training.config import TrainingConfig

VALUES: dict[str, Any] = {
    "tokens": 10**9, "global_batch_size": 256, "micro_batch_size": 1, "sequence_length": 4096,
}  # fmt: skip
CONFIG = TrainingConfig(**VALUES)


FSDP2 = "launch.accelerate_config=fsdp2"


def shown(
    gpu: str, count: int, node_memory: float | None = None, shape: Any = LLAMA_2_7B, **changes: Any
) -> str:
    console = Console(width=160, record=True, file=None, quiet=False)
    options = ClusterOptions(gpu, 1, count, node_memory=node_memory)
    config = TrainingConfig(**{**VALUES, **changes})
    with console.capture() as captured:
        show_fit(console, shape, config, options, [FSDP2] if count == 1 else [])
    return " ".join(captured.get().split())


def needed(fitting: Fitting, cluster: Cluster) -> float:
    """Memory of the recipe with the overrides as a user types them."""
    values: dict[str, Any] = {**VALUES}
    for override in fitting.overrides:
        key, _, value = override.removeprefix("training.").partition("=")
        typed: Any = yaml.safe_load(value)
        first, _, rest = key.partition(".")
        values[first] = {**values.get(first, {}), rest: typed} if rest else typed
    work = Workload.of(TrainingConfig(**values), cluster.ranks)
    return memory_on(LLAMA_2_7B, work, cluster).total


@pytest.mark.parametrize(("gpu", "count"), [("rtx4090", 8), ("rtx4090", 1), ("a100-40gb", 2)])
def test_every_list_fits_and_none_is_longer_than_needed(gpu: str, count: int) -> None:
    cluster = Cluster.of(gpu, 1, count)
    found = list(fittings(LLAMA_2_7B, CONFIG, cluster))
    best = shortest(found)
    assert best
    assert best.rungs
    for fitting in found:
        assert fitting.memory == needed(fitting, cluster) <= cluster.gpu.memory - RESERVE
        assert len(fitting.overrides) >= len(best.overrides)
        if len(fitting.overrides) == len(best.overrides):
            assert fitting.tokens_per_second <= best.tokens_per_second


def test_7b_on_eight_consumer_gpus_needs_recomputation_alone() -> None:
    words = shown("rtx4090", 8)
    assert (
        "shortest: 17.7 GB, and 113 GB of the node's memory; 8,530 tokens per second, 91% " in words
    )
    assert " enough training.activation_checkpointing=full " in words
    assert "training.precision=pure-bf16" in words


def test_on_one_the_states_have_to_go_to_the_cpu() -> None:
    words = shown("rtx4090", 1)
    assert "in nodes with 128 GB (--node-memory)" in words
    # a copy for asynchronous checkpoints is 81 GB more
    same = "computes the same: 12.1 GB, and 112 GB of the node's memory; 781 tokens per second, 32%"
    assert same in words
    assert "training.offload=all training.checkpoints.asynchronous=false" in words


def test_a_node_without_room_gets_nothing() -> None:
    words = shown("rtx4090", 1, node_memory=100)
    assert "offload=all" not in words
    assert "computes the same" not in words
    with pytest.raises(
        UserError, match=r"in nodes with 3 GB \(--node-memory\); take GPUs or nodes"
    ):
        shown("rtx4090", 1, node_memory=3)


def test_the_table_of_the_documentation() -> None:
    """docs/scaling.md"""
    table: dict[tuple[str, int, int | None], tuple[str, str]] = {
        ("rtx4090", 8, None): (
            "17.7 GB, and 113 GB of the node's memory; 8,530 tokens per second, 91% of",
            "training.activation_checkpointing=full",
        ),
        ("rtx4090", 1, 256): (
            "12.1 GB, and 193 GB of the node's memory; 781 tokens per second, 32% of",
            f"{FSDP2} training.activation_checkpointing=selective training.offload=all",
        ),
        ("rtx4090", 1, None): (
            "19.7 GB, and 7 GB of the node's memory; 2,215 tokens per second, 92% of",
            f"{FSDP2} training.activation_checkpointing=full training.precision=pure-bf16 training.lora.rank=64",
        ),
        ("h200", 1, None): (
            "134.2 GB, and 85 GB of the node's memory; 11,786 tokens per second, 100% of",
            FSDP2,
        ),
    }
    for (gpu, count, memory), (words, overrides) in table.items():
        found = shown(gpu, count, memory)
        assert (
            f"shortest: {words} the recipe's on GPUs with memory enough {overrides} fastest:"
            in found
        )
    as_it_is = "as it is: 39.9 GB, and 113 GB of the node's memory."
    assert f"It fits on 8 GPUs (a100) in nodes with 1,920 GB (--node-memory) {as_it_is}" in shown(
        "a100", 8
    )


def test_activations_travel_over_pcie() -> None:
    """To the host and back, of all layers, and nothing is computed meanwhile."""
    cluster = Cluster.of("rtx4090", 1, 8)
    here, moved = (
        Workload.of(TrainingConfig(**VALUES, offload_activations=asked), 8)
        for asked in (False, True)
    )
    without, within = (estimate_step(LLAMA_2_7B, work, cluster) for work in (here, moved))
    kept = (
        memory_on(LLAMA_2_7B, moved, cluster).on_host - memory_on(LLAMA_2_7B, here, cluster).on_host
    )
    micro_batches = 256 // 8
    assert within.host == pytest.approx(micro_batches * 2 * kept / 25e9)
    assert within.seconds - within.host == pytest.approx(without.seconds)


def test_activations_are_moved_where_nothing_else_would_do() -> None:
    """Where everything else is set already."""
    fixed = {
        "activation_checkpointing": "full",
        "offload": "all",
        "loss_chunk": 256,
        "sequence_length": 65_536,
    }
    keys = overrides_of("rtx4090", 8, **fixed)
    assert keys
    assert all("training.offload_activations=true" in one for one in keys)


def test_settings_that_contradict_each_other_are_not_proposed() -> None:
    """LoRA allows no phase of all weights before another one; selective keeps what cannot move."""
    phases = [{"train": "all", "tokens": 10**8}, {"train": "all"}]
    assert not any("lora" in line for line in map(str, overrides_of("rtx4090", 8, phases=phases)))
    for line in overrides_of("rtx4090", 8):
        assert not {
            "training.activation_checkpointing=selective",
            "training.offload_activations=true",
        } <= set(line)


def overrides_of(gpu: str, count: int, **changes: Any) -> list[list[str]]:
    config = TrainingConfig(**{**VALUES, **changes})
    return [one.overrides for one in fittings(LLAMA_2_7B, config, Cluster.of(gpu, 1, count))]


def test_what_never_fits() -> None:
    with pytest.raises(UserError, match=r"on 1 GPU \(6 GB GPU\) in nodes with 128 GB"):
        shown("memory=6,tflops=20,bandwidth=400", 1, shape=LLAMA_2_70B)


def test_settings_of_the_recipe_are_kept() -> None:
    found = list(
        fittings(
            LLAMA_2_7B,
            TrainingConfig(**{**VALUES, "activation_checkpointing": "full", "offload": "all"}),
            Cluster.of("rtx4090", 1, 8),
        )
    )
    keys = {override.partition("=")[0] for fitting in found for override in fitting.overrides}
    assert not {"training.activation_checkpointing", "training.offload"} & keys


def test_lists_are_never_cut(capsys: pytest.CaptureFixture[str]) -> None:
    """In a narrow terminal and in a pipe."""
    show_fit(Console(width=40), LLAMA_2_7B, CONFIG, ClusterOptions("rtx4090", 1, 8), [FSDP2])
    assert f"    {FSDP2} training.activation_checkpointing=full\n" in capsys.readouterr().out


def test_a_gpu_may_be_given_by_numbers() -> None:
    gpu = Cluster.of("memory=48,tflops=181,bandwidth=864,link=50", 1, 1).gpu
    assert (gpu.memory, gpu.link, gpu.bandwidth) == (48 * GIGA, 50 * GIGA, 864 * GIGA)
    assert gpu.peak == 181e12


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("rtx9090", "the GPU 'rtx9090' is not known; use one of a100-40gb,"),
        ("memory=48", "tflops is missing in --gpu memory=48"),
        ("memory=x,tflops=1,bandwidth=1", "memory = x in --gpu .* is no number above 0"),
        ("memory=-1,tflops=1,bandwidth=1", "memory = -1 in --gpu .* is no number above 0"),
        ("memory=1,tflops=inf,bandwidth=1", "tflops = inf in --gpu .* is no number above 0"),
        ("memory=1,tflops=1,bandwidth=1,size=1", "size in --gpu .* is none of memory, tflops"),
        ("memory=1,tflops=1,bandwidth=1,memory=2", "memory stands twice in --gpu"),
    ],
)
def test_a_gpu_that_is_not_known_is_one_sentence(text: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        Cluster.of(text, 1, 1)
