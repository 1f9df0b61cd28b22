"""The model of a step's speed: what holds for any constants, and its errors on published runs."""

from dataclasses import replace
from pathlib import Path
from statistics import median

import pytest
from transformers import LlamaConfig

from benchmarks.published import LLAMA_2_7B, LLAMA_8B, blind, published_runs
from benchmarks.scaling import by_source, fit
from cpt_merge.cluster import scaling
from cpt_merge.cluster.plan import PARTS
from cpt_merge.cluster.scaling import (
    GPUS,
    Cluster,
    Ring,
    Sharding,
    StepEstimate,
    Workload,
    checkpoint_cost,
    estimate_step,
    fits,
    hsdp_ranges,
    memory_on,
)
from cpt_merge.core.errors import UserError
from cpt_merge.training.config import TrainingConfig
from cpt_merge.training.flops import flops_per_token

WORK = Workload(4096, 2, 2, compile=True)
DOCS = Path(__file__).parents[2] / "docs" / "scaling.md"


def step(
    nodes: int = 4,
    network: float | None = 800,
    replicas: int = 1,
    work: Workload = WORK,
    gpu: str = "h100",
) -> StepEstimate:
    return estimate_step(LLAMA_8B, work, Cluster.of(gpu, nodes, 8, network), replicas)


@pytest.mark.parametrize("replicas", [1, 4])
def test_a_faster_network_never_slows(replicas: int) -> None:
    seconds = [step(network=100 * 2**i, replicas=replicas).seconds for i in range(8)]
    assert seconds == sorted(seconds, reverse=True)
    assert seconds[0] > 1.5 * seconds[-1]


@pytest.mark.parametrize("field", ["peak", "bandwidth", "link"])
def test_a_faster_gpu_never_slows(field: str) -> None:
    cluster = Cluster.of("h100", 2, 8)
    faster = replace(cluster, gpu=replace(cluster.gpu, **{field: 2 * getattr(cluster.gpu, field)}))
    assert (
        estimate_step(LLAMA_8B, WORK, faster).seconds
        < estimate_step(LLAMA_8B, WORK, cluster).seconds
    )


def test_one_node_does_not_know_the_network() -> None:
    assert step(nodes=1, network=1) == step(nodes=1, network=3200)
    assert step(nodes=2, network=1).seconds > step(nodes=2, network=3200).seconds


def test_on_one_node_hsdp_with_a_replica_a_node_is_fsdp() -> None:
    cluster = Cluster.of("h100", 1, 8)
    assert estimate_step(LLAMA_8B, WORK, cluster, cluster.nodes) == estimate_step(
        LLAMA_8B, WORK, cluster
    )


def test_one_gpu_communicates_nothing() -> None:
    alone = estimate_step(LLAMA_8B, WORK, Cluster.of("h200", 1, 1))
    assert (alone.exposed, alone.contention, alone.copies, alone.stragglers) == (0, 0, 0, 0)


def test_hsdp_never_takes_less_memory_than_fsdp() -> None:
    for nodes in (1, 2, 8):
        cluster = Cluster.of("h100", nodes, 8)
        fsdp, hsdp = (memory_on(LLAMA_8B, WORK, cluster, replicas) for replicas in (1, nodes))
        assert hsdp.total > fsdp.total if nodes > 1 else hsdp == fsdp


def test_what_does_not_fit_is_found() -> None:
    cluster = Cluster.of("a100-40gb", 2, 8)
    work = Workload(4096, 1, 1, activation_checkpointing="full")
    assert fits(memory_on(LLAMA_8B, work, cluster), cluster)
    assert not fits(
        memory_on(LLAMA_8B, work, cluster, 16), cluster
    )  # every GPU a replica: 16 bytes a parameter


def test_more_recomputation_is_more_computing_and_the_same_mfu_flops() -> None:
    found = [
        step(work=replace(WORK, activation_checkpointing=mode))
        for mode in ("none", "selective", "full")
    ]
    assert found[0].matmul < found[1].matmul < found[2].matmul
    assert found[0].attention == found[1].attention < found[2].attention
    assert found[0].seconds < found[1].seconds < found[2].seconds
    assert found[0].flops == found[2].flops


def test_full_recomputation_makes_a_layer_a_third_dearer() -> None:
    gpu = GPUS["h100"]
    once, again = (
        sum(
            each.matmul
            for each in scaling.layer_compute(
                LLAMA_8B, replace(WORK, activation_checkpointing=mode), gpu
            )
        )
        for mode in ("none", "full")
    )
    assert again == pytest.approx(4 / 3 * once)


def test_compiling_and_fp8_never_slow() -> None:
    eager, compiled, fp8 = (
        step(work=replace(WORK, compile=compiled, fp8=fp8)).seconds
        for compiled, fp8 in ((False, False), (True, False), (True, True))
    )
    assert eager > compiled > fp8


def test_micro_batches_repeat_all_but_the_optimizer_and_hsdps_all_reduce() -> None:
    one, four = (step(work=replace(WORK, micro_batches=count)) for count in (1, 4))
    assert four.matmul == pytest.approx(4 * one.matmul)
    assert four.exposed == pytest.approx(4 * one.exposed)
    assert four.optimizer == one.optimizer
    one, four = (
        step(network=100, replicas=4, work=replace(WORK, micro_batches=count)) for count in (1, 4)
    )
    assert four.exposed < 2 * one.exposed


def test_the_parts_are_the_step_and_rates_follow_from_it() -> None:
    found = step()
    assert sum(getattr(found, part) for part in PARTS) == pytest.approx(found.seconds)
    assert found.tokens == 4 * 8 * 2 * 2 * 4096
    assert found.tokens_per_second_per_device * 32 == pytest.approx(found.tokens / found.seconds)
    assert found.hours(found.tokens) * 3600 == pytest.approx(found.seconds)
    assert found.mfu == pytest.approx(found.tokens_per_second_per_device * found.flops / 989.4e12)
    assert 0 < found.exposed_share < 1


def test_mfu_is_counted_as_training_counts_it() -> None:
    for shape in (LLAMA_8B, LLAMA_2_7B):
        config = LlamaConfig(
            vocab_size=shape.vocabulary,
            hidden_size=shape.width,
            intermediate_size=shape.intermediate,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.key_value * shape.heads // shape.query,
            tie_word_embeddings=False,
        )
        assert scaling.flops_of(shape, 4096) == flops_per_token(config, shape.parameters, 4096)


# Collectives: units


def test_a_ring_within_a_node_moves_at_its_link() -> None:
    cluster = Cluster.of("h100", 1, 8)
    latency = 7 * scaling.LINK_HOP + scaling.START_LATENCY
    assert Ring(8, 1).seconds(8e9, cluster) == pytest.approx(
        7e9 / (450e9 * scaling.LINK_SHARE) + latency
    )
    assert Ring(1, 1).seconds(8e9, cluster) == 0


def test_fsdp_has_a_nodes_whole_network_and_hsdps_rings_share_it() -> None:
    cluster = Cluster.of("h100", 4, 8, 800)  # 100 GB/s a node
    whole, one_of_eight = Ring(32, 4), Ring(4, 4)
    assert whole.seconds(32e9, cluster) == pytest.approx(
        31e9 / (100e9 * scaling.LINK_SHARE), rel=1e-3
    )
    assert one_of_eight.seconds(4e9, cluster, passes=2) == pytest.approx(
        6e9 / (12.5e9 * scaling.LINK_SHARE), rel=1e-3
    )


def test_layouts_know_which_gpus_meet() -> None:
    cluster = Cluster.of("h100", 4, 8)
    assert (Sharding(cluster).shard_ring, Sharding(cluster).replica_ring) == (
        Ring(32, 4),
        Ring(1, 1),
    )
    assert (Sharding(cluster, 4).shard_ring, Sharding(cluster, 4).replica_ring) == (
        Ring(8, 1),
        Ring(4, 4),
    )
    assert (Sharding(cluster, 2).shard_ring, Sharding(cluster, 2).replica_ring) == (
        Ring(16, 2),
        Ring(2, 2),
    )
    assert (Sharding(cluster, 8).shard_ring, Sharding(cluster, 8).replica_ring) == (
        Ring(4, 1),
        Ring(8, 4),
    )
    with pytest.raises(
        UserError, match="5 replicas do not divide 4 nodes of 8 GPUs evenly; use 4, one a node"
    ):
        Sharding(cluster, 5)


# HSDP against FSDP


def test_hsdp_wins_on_a_slow_network_once_gradients_are_accumulated() -> None:
    slow = Cluster.of("h100", 1, 8, 200)
    assert hsdp_ranges(LLAMA_8B, replace(WORK, micro_batches=8), slow, 8) == [(2, 8)]
    fsdp, hsdp = (
        step(nodes=8, network=200, replicas=r, work=replace(WORK, micro_batches=8)) for r in (1, 8)
    )
    assert hsdp.seconds < 0.6 * fsdp.seconds


def test_hsdp_is_faster_exactly_in_the_ranges() -> None:
    cluster = Cluster.of("h100", 1, 8, 200)
    work = replace(WORK, micro_batches=1)
    ranges = hsdp_ranges(LLAMA_8B, work, cluster, 32)
    assert ranges
    for nodes in range(2, 33):
        faster = step(nodes, 200, nodes, work).seconds < step(nodes, 200, 1, work).seconds
        assert faster == any(first <= nodes <= last for first, last in ranges)
    assert (
        ranges[-1][1] < 32
    )  # its all-reduce grows with the nodes: HSDP may win on few and lose on many


def test_with_a_fast_network_and_one_micro_batch_hsdp_never_wins() -> None:
    fast = Cluster.of("h100-500w", 1, 8, 6400)
    assert hsdp_ranges(LLAMA_8B, replace(WORK, micro_batches=1), fast, 8) == []


# Checkpoints


def test_a_checkpoint_is_three_numbers_a_parameter() -> None:
    cluster = Cluster.of("h100", 2, 8)
    cost = checkpoint_cost(LLAMA_8B, WORK, cluster, 1, storage=2e9)
    assert cost.size == 12 * LLAMA_8B.parameters
    assert cost.background == cost.size / 2e9
    assert cost.stall == pytest.approx(cost.size / 16 / 50e9)
    assert checkpoint_cost(LLAMA_8B, WORK, cluster, 2, 2e9).stall == pytest.approx(2 * cost.stall)
    assert (
        checkpoint_cost(LLAMA_8B, replace(WORK, precision="pure-bf16"), cluster, 1, 2e9).size
        == cost.size / 2
    )


# Recipes


def test_a_recipe_is_divided_over_the_gpus() -> None:
    config = TrainingConfig(
        tokens=10**9, global_batch_size=256, micro_batch_size=3, sequence_length=2048, compile=True
    )
    work = Workload.of(config, 64)
    assert (work.micro_batches, work.micro_batch_size) == (2, 2.0)  # 3 rows and 1
    assert work.compile
    with pytest.raises(
        UserError, match="global_batch_size = 256 does not divide over 24 GPUs; set 264"
    ):
        Workload.of(config, 24)
    with pytest.raises(UserError, match="for bf16 only"):
        Workload.of(config.model_copy(update={"precision": "fp32"}), 64)


def test_an_unknown_gpu_lists_the_known() -> None:
    with pytest.raises(
        UserError, match=r"'b300' is not known; use one of a100-40gb, a100, h100, h100-500w, h200"
    ):
        Cluster.of("b300", 1, 8)
    assert Cluster.of("H100", 1, 8).gpu is GPUS["h100"]


# Published runs


def test_the_constants_follow_from_the_runs_marked_as_fitted() -> None:
    found = fit(published_runs())
    kept = {"STRAGGLER": scaling.STRAGGLER}
    for name in ("a100", "h100"):
        kept[f"{name} matmul_share"] = GPUS[name].matmul_share
        kept[f"{name} interference"] = GPUS[name].interference
    assert found == pytest.approx(kept, rel=0.005)
    assert found.keys() == kept.keys()


def test_errors_on_runs_that_were_not_used_for_fitting() -> None:
    held = [run for run in published_runs() if not run.fitted]
    assert len(held) > 8 * (len(published_runs()) - len(held))
    errors = sorted(abs(run.error) for run in held)
    assert median(errors) < 0.035
    assert sum(each < 0.15 for each in errors) >= 43
    assert errors[-1] < 0.31


def test_errors_on_runs_that_the_model_does_not_depend_on() -> None:
    errors = [abs(run.error) for run in blind()]
    assert median(errors) < 0.055
    assert sum(each < 0.15 for each in errors) >= 22


@pytest.mark.parametrize(
    "run",
    [run for run in published_runs() if run.source == "torchtitan"],
    ids=lambda run: f"{run.gpu}-{run.gpus}-{run.setting}",
)
def test_errors_on_fsdp2_are_below_five_percent(run) -> None:
    assert abs(run.error) < 0.05


def test_the_page_shows_this_model() -> None:
    page = DOCS.read_text(encoding="utf-8")
    assert by_source([*published_runs(), *blind()]) in page
