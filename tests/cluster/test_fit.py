"""`cpt-merge plan --gpu NAME --fit`: what makes a run fit a GPU's memory."""

from typing import Any

import pytest
from rich.console import Console

from benchmarks.published import LLAMA_2_7B, LLAMA_2_70B
from cpt_merge.cluster.fit import Fitting, fittings, shortest, show_fit
from cpt_merge.cluster.scaling import GIGA, RESERVE, Cluster, Workload, memory_on
from cpt_merge.core.errors import UserError
from cpt_merge.training.config import TrainingConfig

VALUES: dict[str, Any] = {
    "tokens": 10**9, "global_batch_size": 256, "micro_batch_size": 1, "sequence_length": 4096,
}  # fmt: skip
CONFIG = TrainingConfig(**VALUES)


def shown(gpu: str, count: int, shape: Any = LLAMA_2_7B, **changes: Any) -> str:
    console = Console(width=160, record=True, file=None, quiet=False)
    with console.capture() as captured:
        show_fit(console, shape, TrainingConfig(**{**VALUES, **changes}), Cluster.of(gpu, 1, count))
    return " ".join(captured.get().split())


def needed(fitting: Fitting, cluster: Cluster) -> float:
    """Memory of the recipe with the overrides as a user types them."""
    values: dict[str, Any] = {**VALUES}
    for override in fitting.overrides:
        key, _, value = override.removeprefix("training.").partition("=")
        typed: Any = {"true": True}.get(value, int(value) if value.isdigit() else value)
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
    assert "shortest: 18.0 GB; 8,530 tokens per second, 91% of" in words
    assert " launch.accelerate_config=fsdp2 training.activation_checkpointing=full " in words
    assert "training.precision=pure-bf16" in words


def test_on_one_the_states_have_to_go_to_the_cpu() -> None:
    words = shown("rtx4090", 1)
    assert "training.offload=all" in words
    assert "of the node's memory" in words


def test_the_table_of_the_documentation() -> None:
    """docs/scaling.md"""
    table = {
        ("rtx4090", 8): "shortest: 18.0 GB; 8,530 tokens per second, 91% of",
        (
            "rtx4090",
            1,
        ): "shortest: 12.5 GB, and 108 GB of the node's memory; 781 tokens per second, 32% ",
        ("a100", 8): "It fits on 8 GPUs (a100) as it is: 39.9 GB.",
        ("h200", 1): "It fits on 1 GPU (h200) as it is: 134.2 GB.",
    }
    for (gpu, count), words in table.items():
        assert words in shown(gpu, count)
    words = "fsdp2 training.activation_checkpointing=selective training.offload=all fastest"
    assert words in shown("rtx4090", 1)


def test_what_never_fits() -> None:
    with pytest.raises(UserError, match=r"on 1 GPU \(6 GB GPU\); take GPUs with more memory"):
        shown("memory=6,tflops=20,bandwidth=400", 1, LLAMA_2_70B)


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
    show_fit(Console(width=40), LLAMA_2_7B, CONFIG, Cluster.of("rtx4090", 1, 8))
    assert "    launch.accelerate_config=fsdp2 training.activation_checkpointing=full\n" in (
        capsys.readouterr().out
    )


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
