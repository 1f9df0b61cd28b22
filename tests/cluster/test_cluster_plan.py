"""`cpt-merge plan --gpu`: speed on a cluster, from a recipe and the headers of its base."""

import json
import math
import re
import struct
from pathlib import Path
from typing import Any

import pytest
import yaml

from cpt_merge.cluster.plan import ClusterOptions
from cpt_merge.core.errors import UserError
from cpt_merge.launcher.cli import main
from cpt_merge.launcher.plan import show_plan
from cpt_merge.launcher.recipe import load_recipe


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of a Llama of 1.2 B parameters; its file has headers and a hole."""
    folder = tmp_path_factory.mktemp("plan")
    for model in ("base", "chat"):
        write_headers(folder / model)
    for language in ("ko", "en"):
        (folder / f"{language}.txt").write_text("x\n")
    values = {
        "name": "planned", "runs": str(folder / "runs"),
        "models": {"base": str(folder / "base"), "chat": str(folder / "chat")},
        "corpus": {
            "sources": [
                {"path": str(folder / f"{name}.txt"), "language": name} for name in ("ko", "en")
            ]
        },
        "tokenizer": {"new_pieces": {"ko": 1000}},
        "training": {
            "tokens": 10**9, "sequence_length": 4096, "global_batch_size": 256,
            "micro_batch_size": 2,
        },
    }  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def write_headers(folder: Path) -> None:
    """A Llama of 1.2 B parameters."""
    config = {
        "vocab_size": 32_000, "hidden_size": 2048, "intermediate_size": 8192,
        "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
    }  # fmt: skip
    shapes = {"model.embed_tokens.weight": [32_000, 2048], "lm_head.weight": [32_000, 2048]}
    for layer in range(16):
        shapes[f"model.layers.{layer}.mlp.all.weight"] = [2048, 30_000]
    write_holes(folder, config, shapes)


def write_holes(folder: Path, config: dict[str, Any], shapes: dict[str, list[int]]) -> None:
    """A model whose file has headers and a hole."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


def planned(
    path: Path, capsys: pytest.CaptureFixture[str], request: ClusterOptions | None, *overrides: str
) -> str:
    """The output, with single spaces."""
    show_plan(load_recipe(path, list(overrides)), request)
    return " ".join(capsys.readouterr().out.split())


def test_a_cluster_is_estimated_with_both_layouts(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = planned(path, capsys, ClusterOptions("h100", nodes=4))
    assert "4 x 8 h100, 3,200 Gbit/s a node: 4 micro-batches of 2 sequences on each GPU" in words
    assert "FSDP HSDP, 4 replicas" in words
    for part in (
        "tokens per second",
        "MFU",
        "exposed communication",
        "GPU-hours",
        "memory at once",
        "of 80 GB",
        "a checkpoint",
    ):
        assert part in words
    assert "nodes GPUs micro FSDP tok/s/GPU GB HSDP tok/s/GPU GB days faster" in words
    assert "16 128 1" in words  # as long as every GPU has a sequence
    assert "With 4 micro-batches of 2 sequences on every GPU, " in words


def test_one_node_needs_no_network_and_has_one_layout(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = planned(path, capsys, ClusterOptions("a100"))
    assert "estimate for 1 x 8 a100: 16 micro-batches" in words
    assert "HSDP, " not in words.partition("one step")[0]


def test_what_does_not_fit_is_marked(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = planned(
        path,
        capsys,
        ClusterOptions("memory=8,tflops=100,bandwidth=900"),
        "training.micro_batch_size=32",
    )
    assert "of 8 GB: does not fit" in words
    assert "nodes GPUs micro FSDP GB 1 8 1 " in words
    assert "The run fits on none of them: a GPU needs at least" in words
    assert "tok/s" not in words
    assert "HSDP is faster" not in words


def test_a_layout_that_fits_nowhere_has_no_column(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """HSDP keeps a whole replica in a node of two GPUs."""
    cluster = ClusterOptions("memory=11,tflops=100,bandwidth=900", nodes=8, gpus_per_node=2)
    words = planned(path, capsys, cluster, "training.activation_checkpointing=full")
    assert "8 replicas" not in words
    assert "nodes GPUs micro FSDP tok/s/GPU GB days 1 2 64 - " in words
    assert "HSDP fits on none of them: a GPU needs at least" in words
    assert "HSDP is faster" not in words


def test_a_checkpoint_that_begins_before_the_last_one_is_on_disk_is_marked(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "sooner than it is on disk" in planned(
        path, capsys, ClusterOptions("h100", storage=0.01), "training.checkpoints.every=1"
    )
    assert "sooner" not in planned(path, capsys, ClusterOptions("h100"))


def test_deepspeed_is_not_estimated(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = planned(
        path,
        capsys,
        ClusterOptions("h100"),
        "launch.accelerate_config=recipes/accelerate/zero3.yaml",
    )
    assert "asks for DeepSpeed; the estimate is for FSDP2 and HSDP" in words


@pytest.mark.parametrize(
    ("gpu", "override", "sentence"),
    [
        (
            "v100",
            None,
            "the GPU 'v100' is not known; use one of a100-40gb, a100, h100",
        ),
        ("h100", "training.global_batch_size=100", "= 100 does not divide over 8 GPUs; set 104"),
        ("h100", "training.precision=fp32", "for bf16 only; set training.precision"),
        ("a100", "training.fp8=true", "a100 has no float8 matmuls"),
        (
            None,
            "training.sequence_length=16384",
            "= 16384 but the model has 8192 positions; lower it",
        ),
    ],
)
def test_contradictions_are_one_sentence_before_anything_else(
    path: Path,
    capsys: pytest.CaptureFixture[str],
    gpu: str | None,
    override: str | None,
    sentence: str,
) -> None:
    recipe = load_recipe(path, [override] if override else [])
    with pytest.raises(UserError, match=sentence):
        show_plan(recipe, ClusterOptions(gpu) if gpu else None)
    assert capsys.readouterr().out == ""


def write_qwen3_30b_a3b(folder: Path) -> None:
    """Its published sizes; a file with headers and a hole of 61 GB."""
    config = {
        "model_type": "qwen3_moe", "vocab_size": 151_936, "hidden_size": 2048, "intermediate_size": 6144,
        "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
        "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8,
        "tie_word_embeddings": False, "max_position_embeddings": 40_960,
    }  # fmt: skip
    shapes = {name: [151_936, 2048] for name in ("model.embed_tokens.weight", "lm_head.weight")}
    shapes["model.norm.weight"] = [2048]
    for layer in (f"model.layers.{number}." for number in range(48)):
        shapes |= {
            f"{layer}{name}_layernorm.weight": [2048] for name in ("input", "post_attention")
        }
        shapes |= {f"{layer}self_attn.{name}_norm.weight": [128] for name in "qk"}
        shapes |= {f"{layer}self_attn.{name}_proj.weight": [512, 2048] for name in "kv"}
        shapes |= {
            f"{layer}self_attn.q_proj.weight": [4096, 2048],
            f"{layer}self_attn.o_proj.weight": [2048, 4096],
        }
        shapes[f"{layer}mlp.gate.weight"] = [128, 2048]
        for expert in range(128):
            one = f"{layer}mlp.experts.{expert}."
            shapes |= {f"{one}{name}_proj.weight": [768, 2048] for name in ("gate", "up")}
            shapes[f"{one}down_proj.weight"] = [2048, 768]
    write_holes(folder, config, shapes)


def test_qwen3_30b_a3b_is_planned_with_its_active_parameters(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """docs/families.md has these numbers: published are 30.5 B parameters, 3.3 B of them active."""
    write_qwen3_30b_a3b(tmp_path / "qwen")
    words = planned(
        path, capsys, ClusterOptions("h100"), f"models.base={tmp_path / 'qwen'}",
        "tokenizer.new_pieces={}", "training.activation_checkpointing=full", "training.micro_batch_size=1",
    )  # fmt: skip
    assert "30,532.1 M parameters (3,353.0 M active), 151,936 rows" in words
    assert "128 in a layer, of which a token uses 8" in words
    assert "27.91 GFLOP per token" in words
    assert "take the speed as an upper bound" in words
    print(words)


def test_the_command_takes_the_cluster_as_options(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--gpu", "h200", "--nodes", "2", "--gpus-per-node", "4", "--network", "400"]
    assert main(["plan", str(path), *options]) == 0
    assert "2 x 4 h200, 400 Gbit/s a node" in " ".join(capsys.readouterr().out.split())


def test_options_of_a_cluster_need_its_gpu(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(path), "--nodes", "2"]) == 2
    assert "--node-memory and --fit belong to --gpu NAME; add it" in capsys.readouterr().err


def test_a_run_of_vocabulary_alone_takes_less_on_a_cluster(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one_gpu = ClusterOptions("h100", gpus_per_node=1)
    needed = []
    for overrides in ([], ["training.phases=[{train: vocabulary}]"]):
        words = planned(path, capsys, one_gpu, *overrides)
        needed.append(float(words.split("memory at once ")[1].split(" of 80 GB")[0]))
    assert needed[1] < 0.6 * needed[0]


def test_fit_is_a_command(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(path), "--gpu", "rtx4090", "--gpus", "1", "--fit"]) == 0
    words = " ".join(capsys.readouterr().out.split())
    assert "1 x 1 rtx4090" in words
    assert "no run on rtx4090 was compared with them" in words
    assert "launch.accelerate_config=fsdp2 training.activation_checkpointing=full" in words


@pytest.mark.parametrize(
    ("gpus", "recipe", "first"),
    [
        ("1", [], "launch.accelerate_config=fsdp2 training."),
        ("2", [], "training."),
        ("2", ["launch.accelerate_config=fsdp2-offload"], "training."),
        (
            "2",
            ["launch.accelerate_config=zero2-offload"],
            "launch.accelerate_config=fsdp2 training.offload=all ",
        ),
        ("2", ["training.phases=[{train: all, tokens: 1}, {train: all}]"], "training."),
    ],
)
def test_overrides_that_are_pasted_make_the_run_fit(
    path: Path, capsys: pytest.CaptureFixture[str], gpus: str, recipe: list[str], first: str
) -> None:
    cluster = ["--gpu", "memory=9,tflops=100,bandwidth=900", "--gpus", gpus, "--fit"]
    assert main(["plan", str(path), *recipe, *cluster]) == 0
    printed = capsys.readouterr().out.splitlines()
    pasted = {line.strip() for line in printed if re.match("    (launch|training)[.]", line)}
    assert pasted
    for line in pasted:
        assert line.startswith(first)
        assert main(["plan", str(path), *recipe, *line.split(), *cluster]) == 0
        again = capsys.readouterr().out
        assert "in nodes with 128 GB (--node-memory) as it is: " in again, line
        assert "does not fit" not in again.partition("the same batch on other numbers")[0]


@pytest.mark.parametrize("name", ["fsdp2-offload", "zero2-offload"])
def test_what_the_accelerate_file_offloads_is_estimated_as_such(
    path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    asked = ["launch.accelerate_config=fsdp2", "training.offload=all"]
    expected, found = (
        planned(path, capsys, ClusterOptions("h100"), *overrides)
        for overrides in (asked, [f"launch.accelerate_config={name}"])
    )
    assert "to and from the host" in found
    assert found.split("docs/scaling.md says")[1] == expected.split("docs/scaling.md says")[1]


def test_a_node_has_a_memory_of_its_own(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = planned(path, capsys, ClusterOptions("h100", node_memory=32))
    assert "of 32 GB: does not fit" in words.split("memory of a node")[1]
    assert "of 1,920 GB" in planned(path, capsys, ClusterOptions("h100"))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--fit"], "belong to --gpu NAME; add it"),
        (["--gpu", "l4", "--gpus", "12"], "--gpus 12 does not fill nodes of 8; set a multiple of"),
        (["--gpu", "l4", "--gpus", "12", "--nodes", "5"], "--gpus 12 does not divide over --nodes"),
        (["--gpu", "l4", "--gpus", "4", "--nodes", "8"], "set a multiple of 8"),
        (["--gpu", "l4", "--network", "inf"], "--network is infinite; leave it out, or give a num"),
        (
            ["--gpu", "l4", "--gpus", "1000000"],
            "= 256 has fewer sequences than there are GPUs, 1,000,000; take at most 256, or set",
        ),
        (["--gpu", "l4", "--gpus", "48"], "does not divide over 48 GPUs; set 288, or take 32"),
        (
            ["--gpu", "l4", "--gpus", "12", "--nodes", "2", "--gpus-per-node", "8"],
            "--gpus 12 is not 2 x 8",
        ),
    ],
)
def test_numbers_of_gpus_that_contradict_each_other(
    path: Path, capsys: pytest.CaptureFixture[str], options: list[str], sentence: str
) -> None:
    assert main(["plan", str(path), *options]) == 2
    assert sentence in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("training.lora.targets=[nope]", "nope names no linear layer in the decoder of"),
        ("training.offload=all", "set launch.accelerate_config to fsdp2 or zero3"),
        ("training.offload=optimizer", "set launch.accelerate_config to zero1, zero2 or zero3"),
    ],
)
def test_what_training_would_refuse_is_refused_for_a_cluster_too(
    path: Path, capsys: pytest.CaptureFixture[str], override: str, sentence: str
) -> None:
    assert main(["plan", str(path), override, "--gpu", "rtx4090", "--gpus", "1"]) == 2
    assert sentence in " ".join(capsys.readouterr().err.split())


def test_adapters_are_counted(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of sixteen matrices of 2,048 x 30,000."""
    words = planned(path, capsys, ClusterOptions("h100"), "training.lora.rank=8")
    assert f"adapters rank 8, {16 * 8 * 32_048 / 1e6:,.1f} M parameters; 135.3 M of" in words
