"""Published training speeds with the settings of their sources, for `benchmarks.scaling`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from cpt_merge.cluster.scaling import Cluster, StepEstimate, Workload, estimate_step
from cpt_merge.training.config import LoraConfig
from cpt_merge.training.memory import ModelShape


@dataclass(frozen=True)
class PublishedRun:
    """A published run. `replicas` 1: FSDP; more: HSDP."""

    source: str
    model: str
    shape: ModelShape
    work: Workload
    gpu: str
    gpus: int
    published: float  # tokens per second and GPU
    network: float | None = None  # Gbit/s of a node; None: not published, 400 per GPU
    gpus_per_node: int = 8
    replicas: int = 1
    note: str = ""
    fitted: str = ""  # the constant that was fitted on this run

    @property
    def cluster(self) -> Cluster:
        """The cluster that it ran on."""
        per_node = min(self.gpus, self.gpus_per_node)
        return Cluster.of(self.gpu, self.gpus // per_node, per_node, self.network)

    def estimate(self) -> StepEstimate:
        """The model's estimate."""
        return estimate_step(self.shape, self.work, self.cluster, self.replicas)

    @property
    def error(self) -> float:
        """Estimated over published tokens per second, minus 1."""
        return self.estimate().tokens_per_second_per_device / self.published - 1

    @property
    def setting(self) -> str:
        """What distinguishes the run."""
        work = self.work
        words = [f"{work.sequence_length}", f"{work.micro_batch_size:g} x {work.micro_batches}"]
        if work.compile:
            words.append("compiled")
        if work.fp8:
            words.append("fp8")
        if work.activation_checkpointing != "none":
            words.append(f"{work.activation_checkpointing} AC")
        if self.replicas > 1:
            words.append("HSDP")
        if self.note:
            words.append(self.note)
        return ", ".join(words)


def llama(
    vocabulary: int, width: int, layers: int, heads: int, key_value_heads: int, intermediate: int
) -> ModelShape:
    """A LLaMA with separate embedding and head."""
    key_value = width // heads * key_value_heads
    layer = width * (2 * width + 2 * key_value + 3 * intermediate + 2)
    parameters = layers * layer + 2 * vocabulary * width + width
    ends = 4 * width + 2 * (width + key_value) + 3 * (width + intermediate)  # of seven matrices
    return ModelShape(
        parameters, vocabulary, width, layers, 2, intermediate, heads, width, key_value,
        adapters=LoraConfig().rank * layers * ends,
    )  # fmt: skip


def mpt(parameters: int, width: int, layers: int) -> ModelShape:
    """An MPT of llm-foundry's yamls: tied, heads of 128.

    Its MLP of width 4 h has no gate: its 2 c i bytes count as 3 c (2/3 i) of a gated one.
    """
    return ModelShape(
        parameters, 50_368, width, layers, 1, 8 * width // 3, width // 128, width, width
    )


LLAMA_8B = llama(128_256, 4096, 32, 32, 8, 14_336)
LLAMA_2_7B = llama(32_000, 4096, 32, 32, 32, 11_008)
LLAMA_2_13B = llama(32_000, 5120, 40, 40, 40, 13_824)
LLAMA_34B = llama(32_000, 8192, 48, 64, 8, 22_016)
LLAMA_2_70B = llama(32_000, 8192, 80, 64, 8, 28_672)
KEMPNER_13B = llama(128_256, 5120, 40, 40, 8, 17_920)
MPT_3B = mpt(2_651_837_440, 2560, 32)
MPT_7B = mpt(6_658_859_008, 4096, 32)
MPT_13B = mpt(12_853_954_560, 5120, 40)
MPT_30B = mpt(29_975_214_080, 7168, 48)
MPT_70B = mpt(64_862_437_376, 8192, 80)


def published_runs() -> list[PublishedRun]:
    """All runs that the model can describe."""
    return [
        *_torchtitan(),
        *_fms(),
        *_llm_foundry_hopper(),
        *_llm_foundry_ampere(),
        *_kempner(),
        *_others(),
    ]


def _torchtitan() -> Iterator[PublishedRun]:
    """benchmarks/llama3_h100_202412_torchtitan.md, llama3-8b_h200_202506_trainy-whitefiber.md."""
    eager = Workload(8192, 2, 1, activation_checkpointing="selective")
    compiled = replace(eager, compile=True)
    fp8 = replace(compiled, fp8=True)
    for work, small, large in ((eager, 5762, 5605), (compiled, 6667, 6514), (fp8, 8532, 8380)):
        for gpus, published in ((8, small), (128, large)):
            fitted = "STRAGGLER" if work is compiled else ""
            yield PublishedRun(
                "torchtitan",
                "Llama 3.1 8B",
                LLAMA_8B,
                work,
                "h100-500w",
                gpus,
                published,
                3200,
                fitted=fitted,
            )
    for gpus, published in ((32, 10_938), (64, 10_753)):
        yield PublishedRun(
            "torchtitan", "Llama 3.1 8B", LLAMA_8B, fp8, "h200", gpus, published, 3200
        )


def _fms() -> Iterator[PublishedRun]:
    """fms-fsdp's README: sequences of 4,096, reduction in bf16.

    What is recomputed follows from its HFU over its MFU.
    """
    models = (
        ("Llama 2 7B", LLAMA_2_7B, "none", True),
        ("Llama 2 13B", LLAMA_2_13B, "selective", False),
        ("Llama 34B", LLAMA_34B, "full", False),
        ("Llama 2 70B", LLAMA_2_70B, "full", False),
    )
    for gpu, gpus, network, speeds in (
        ("a100", 128, 400, (4550, 2150, 820, 410)),
        ("h100", 96, 800, (9600, 4850, 1830, 890)),
    ):
        for (name, shape, recomputed, hsdp), published in zip(models, speeds, strict=True):
            work = Workload(
                4096, 2, 1, activation_checkpointing=recomputed, compile=True, reduce_bytes=2
            )
            replicas = gpus // 8 if hsdp else 1
            yield PublishedRun(
                "fms-fsdp", name, shape, work, gpu, gpus, published, network, replicas=replicas
            )


def _mpt(
    length: int,
    micro_batch_size: int,
    micro_batches: int,
    recompute: str = "none",
    pure: bool = False,
) -> Workload:
    """A run of llm-foundry: fused norms and activations count as compiled; PURE reduces in bf16."""
    precision = "pure-bf16" if pure else "bf16"
    return Workload(
        length,
        micro_batch_size,
        micro_batches,
        precision,
        recompute,
        compile=True,
        reduce_bytes=2 if pure else 4,
    )


def _llm_foundry_hopper() -> Iterator[PublishedRun]:
    """llm-foundry's scripts/train/benchmarking/README.md; the H100s' network is not published."""
    for shape, name, work, runs in (
        (MPT_7B, "MPT 7B", _mpt(2048, 6, 1), ((8, 10_643), (128, 10_475), (256, 10_119),
                                              (512, 9670))),
        (MPT_7B, "MPT 7B", _mpt(4096, 16, 2, "full"), ((8, 8611),)),
        (MPT_7B, "MPT 7B", _mpt(8192, 8, 2, "full"), ((8, 6935),)),
        (MPT_3B, "MPT 3B", _mpt(2048, 6, 3), ((32, 23_021), (64, 22_525))),
        (MPT_13B, "MPT 13B", _mpt(2048, 2, 1), ((8, 4792), (16, 4767), (32, 4811), (64, 4800))),
        (MPT_13B, "MPT 13B", _mpt(2048, 16, 1, "full"), ((128, 5080), (256, 4989), (512, 4952))),
        (MPT_30B, "MPT 30B", _mpt(2048, 8, 1, "full"), ((128, 2199), (256, 2148), (512, 2115))),
        (MPT_70B, "MPT 70B", _mpt(2048, 8, 1, "full"), ((128, 1058), (256, 1035), (512, 1007))),
    ):  # fmt: skip
        for gpus, published in runs:
            fitted = {4792: "interference", 5080: "matmul_share"}.get(published, "")
            yield PublishedRun(
                "llm-foundry", name, shape, work, "h100", gpus, published, fitted=fitted
            )


def _llm_foundry_ampere() -> Iterator[PublishedRun]:
    """The same page; nodes of 8 A100s with 1,600 Gbit/s."""
    small, large, full = "a100-40gb", "a100", "full"
    for gpu, shape, name, work, runs in (
        (large, MPT_7B, "MPT 7B", _mpt(2048, 6, 2), ((8, 4641),)),
        (large, MPT_7B, "MPT 7B", _mpt(4096, 16, 2, full), ((8, 3684),)),
        (large, MPT_13B, "MPT 13B", _mpt(2048, 2, 3), ((8, 2262),)),
        (small, MPT_7B, "MPT 7B", _mpt(2048, 18, 1, full, True), ((32, 3725), (64, 3665),
                                                                  (128, 3623))),
        (small, MPT_13B, "MPT 13B", _mpt(2048, 16, 1, full, True), ((64, 1976), (128, 1972))),
        (small, MPT_30B, "MPT 30B", _mpt(2048, 6, 1, full, True), ((128, 865),)),
        (small, MPT_70B, "MPT 70B", _mpt(2048, 4, 1, full, True), ((128, 376),)),
        (small, MPT_70B, "MPT 70B", _mpt(2048, 2, 1, full, True), ((64, 276),)),
    ):  # fmt: skip
        for gpus, published in runs:
            fitted = {2262: "interference", 1972: "matmul_share"}.get(published, "")
            yield PublishedRun(
                "llm-foundry", name, shape, work, gpu, gpus, published, 1600, fitted=fitted
            )


def blind() -> list[PublishedRun]:
    """More runs of llm-foundry's page, on which neither the model nor its constants depend."""
    full = "full"
    return [
        PublishedRun(
            "llm-foundry", name, shape, work, gpu, gpus, published,
            None if gpu == "h100" else 1600,
        )
        for gpu, shape, name, work, gpus, published in (
            ("h100", MPT_3B, "MPT 3B", _mpt(2048, 10, 3), 16, 24_142),
            ("h100", MPT_3B, "MPT 3B", _mpt(4096, 5, 6), 8, 20_964),
            ("h100", MPT_3B, "MPT 3B", _mpt(8192, 3, 6), 8, 16_578),
            ("h100", MPT_7B, "MPT 7B", _mpt(1024, 64, 2, full), 8, 10_203),
            ("h100", MPT_13B, "MPT 13B", _mpt(1024, 40, 3, full), 8, 5502),
            ("h100", MPT_13B, "MPT 13B", _mpt(4096, 10, 3, full), 8, 4717),
            ("h100", MPT_30B, "MPT 30B", _mpt(1024, 6, 21, full), 8, 2084),
            ("h100", MPT_30B, "MPT 30B", _mpt(2048, 3, 21, full), 8, 2002),
            ("h100", MPT_30B, "MPT 30B", _mpt(4096, 1, 21, full), 8, 1802),
            ("h100", MPT_30B, "MPT 30B", _mpt(8192, 1, 21, full), 8, 1384),
            ("h100", MPT_30B, "MPT 30B", _mpt(2048, 10, 3, full), 16, 2263),
            ("h100", MPT_30B, "MPT 30B", _mpt(2048, 14, 3, full), 32, 2308),
            ("h100", MPT_70B, "MPT 70B", _mpt(2048, 2, 16, full), 32, 882),
            ("h100", MPT_70B, "MPT 70B", _mpt(2048, 8, 4, full), 64, 1039),
            ("a100", MPT_3B, "MPT 3B", _mpt(2048, 10, 2), 8, 10_811),
            ("a100", MPT_3B, "MPT 3B", _mpt(4096, 5, 6), 8, 9457),
            ("a100", MPT_7B, "MPT 7B", _mpt(1024, 64, 2, full), 8, 4357),
            ("a100", MPT_7B, "MPT 7B", _mpt(8192, 8, 2, full), 8, 3206),
            ("a100", MPT_13B, "MPT 13B", _mpt(4096, 10, 3, full), 8, 2060),
            ("a100", MPT_30B, "MPT 30B", _mpt(2048, 3, 21, full), 8, 916),
            ("a100", MPT_30B, "MPT 30B", _mpt(4096, 1, 21, full), 8, 814),
            ("a100", MPT_70B, "MPT 70B", _mpt(2048, 2, 16, full, True), 32, 373),
            ("a100", MPT_70B, "MPT 70B", _mpt(2048, 8, 4, full, True), 64, 410),
            ("a100-40gb", MPT_13B, "MPT 13B", _mpt(2048, 4, 16, full, True), 8, 1668),
            ("a100-40gb", MPT_13B, "MPT 13B", _mpt(2048, 10, 1, full, True), 16, 1993),
            ("a100-40gb", MPT_30B, "MPT 30B", _mpt(2048, 4, 1, full, True), 32, 857),
        )
    ]  # fmt: skip


def _kempner() -> Iterator[PublishedRun]:
    """KempnerForge's benchmarks/mfu_scaling: 4 H200s a node, NDR 400 Gbit/s (taken per GPU)."""
    for gpus, per_micro_batch, published in (
        (1, 2, 10_471),
        (2, 2, 18_728 / 2),
        (4, 4, 38_983 / 4),
    ):
        work = Workload(
            4096,
            per_micro_batch,
            8 // per_micro_batch,
            activation_checkpointing="full",
            compile=True,
        )
        yield PublishedRun(
            "KempnerForge", "Llama 3 8B", LLAMA_8B, work, "h200", gpus, published, gpus_per_node=4
        )
    larger = Workload(4096, 4, 4, activation_checkpointing="full")
    yield PublishedRun(
        "KempnerForge", "Llama 3 13B", KEMPNER_13B, larger, "h200", 8, 35_405 / 8, gpus_per_node=4
    )


def _others() -> Iterator[PublishedRun]:
    """Megatron-Bridge's performance summary (25.11), accelerate's torch_native_parallelism."""
    megatron = Workload(8192, 1, 16, compile=True, fp8=True)
    yield PublishedRun(
        "Megatron-Bridge", "Llama 3 8B", LLAMA_8B, megatron, "h100", 8, 14_451, note="its kernels"
    )
    plain = Workload(8192, 1, 1, compile=True)
    for work, published in ((plain, 8000), (replace(plain, fp8=True), 10_000)):
        yield PublishedRun(
            "accelerate",
            "Llama 3.1 8B",
            LLAMA_8B,
            work,
            "h100",
            8,
            published,
            note="read off a figure",
        )


def beyond() -> list[PublishedRun]:
    """Runs that the model does not describe, or of which too little is published."""
    guess = Workload(8192, 1, 8, activation_checkpointing="full")
    smol = llama(128_256, 2048, 36, 16, 4, 11_008)
    tied = replace(smol, parameters=smol.parameters - smol.vocabulary * smol.width, matrices=1)
    tensor_parallel = Workload(4096, 1.5, 1, compile=True)
    return [
        PublishedRun(
            "TAIDE",
            "Llama 3 8B",
            LLAMA_8B,
            guess,
            "h100",
            8,
            5113,
            note="set-up not published: a guess",
        ),
        PublishedRun(
            "SmolLM3",
            "SmolLM3 3B",
            tied,
            tensor_parallel,
            "h100",
            384,
            13_800,
            note="was tensor parallel",
        ),
    ]
