"""Keys of accelerate's and DeepSpeed's files are those of the installed libraries, and no others."""

import ast
import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import accelerate.commands.config.cluster
import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig
from accelerate.commands.config.default import write_basic_config
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env

from cpt_merge.core.errors import UserError
from cpt_merge.launcher.accelerate_file import (
    ACCELERATE_CONFIGS,
    _launched_file,
    backend_environment,
    check_accepted,
    check_keys,
)
from cpt_merge.launcher.recipe import load_recipe
from cpt_merge.launcher.start import check_one_machine
from cpt_merge.training.config import TrainingConfig
from cpt_merge.training.distributed.agreement import not_used
from cpt_merge.training.distributed.settings import BackendSettings, backend_settings
from tests.command_line import cpt_merge

FSDP = {"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 2}}
CLIPPED = {"zero_optimization": {"stage": 3}, "gradient_clipping": 0.3, "train_batch_size": "auto"}


def write(folder: Path, **values: Any) -> Path:
    path = folder / "accelerate.yaml"
    path.write_text(yaml.safe_dump({"mixed_precision": "no", **values}))
    return path


def with_json(folder: Path, settings: object) -> Path:
    """An accelerate configuration that names DeepSpeed's own file."""
    file = folder / "DeepSpeed.json"
    file.write_text(settings if isinstance(settings, str) else json.dumps(settings))
    section = {"deepspeed_config_file": str(file), "zero3_init_flag": False}
    return write(folder, distributed_type="DEEPSPEED", deepspeed_config=section)


def asked(path: Path) -> BackendSettings:
    return backend_settings(backend_environment(path))


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as refused:
        asked(path)
    return str(refused.value)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (
            {"fsdp_config": {"fsdp_version": 2, "fsdp_offload_param": True}},
            'no key fsdp_config.fsdp_offload_param (did you mean "fsdp_offload_params"?)',
        ),
        (
            {"fsdp_config": {"fsdp_versoin": 2}},
            'no key fsdp_config.fsdp_versoin (did you mean "fsdp_version"?)',
        ),
        ({"fsdp_config": {"offload_param": None}}, 'mean "fsdp_offload_params"?'),
        (
            {"parallelism_config": {"parallelism_config_dp_replicate_sise": 2}},
            'mean "parallelism_config_dp_replicate_size"?',
        ),
        ({"deepspeed_config": {"zero_stag": 3}}, 'mean "zero_stage"?'),
        ({"mixed_precison": "bf16"}, 'no key mixed_precison (did you mean "mixed_precision"?)'),
        ({"fsdp_version": 2}, "no key fsdp_version, which belongs in fsdp_config"),
        ({"fsdp_config": {"zero_stage": 2}}, "zero_stage, which belongs in deepspeed_config"),
        ({"fsdp_config": [2]}, "fsdp_config is [2], but it must be a mapping of keys"),
        ({"fsdp_config": {2: 2}}, "no key fsdp_config.2"),
    ],
)
def test_a_key_that_accelerate_would_ignore_is_refused(
    values: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    path = write(tmp_path, **{**FSDP, **values})
    found = refusal(path)
    assert str(path) in found
    assert sentence in found


@pytest.mark.parametrize(
    ("section", "sentence"),
    [
        ({"fsdp_version": 2, "fsdp_offload_params": "maybe"}, "fsdp_offload_params of the accel"),
        ({"fsdp_version": 2, "fsdp_reshard_after_forward": "FULL_SHARD"}, "must be true or false"),
        (
            {"fsdp_version": 2, "fsdp_activation_checkpointing_offload": True},
            "set the recipe's training.offload_activations instead",
        ),
        ({"fsdp_version": 2, "fsdp_sharding_strategy": "HYBRID_SHARD"}, "which FSDP 2 ignores"),
        (None, "asks for FSDP 1"),
    ],
)
def test_a_value_that_is_none_is_refused(section: Any, sentence: str, tmp_path: Path) -> None:
    assert sentence in refusal(write(tmp_path, distributed_type="FSDP", fsdp_config=section))


def test_numbers_and_other_backends_sizes(tmp_path: Path) -> None:
    zero = {"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": "two"}}
    assert "zero_stage of the accelerate config is two" in refusal(write(tmp_path, **zero))
    sizes = {"parallelism_config_sp_size": 2}
    zero["deepspeed_config"] = {"zero_stage": 2}
    assert "parallelism_config_sp_size > 1" in refusal(
        write(tmp_path, **zero, parallelism_config=sizes)
    )
    sizes = {"parallelism_config_dp_replicate_size": 2}
    assert "dp_replicate_size > 1, which is not supported without FSDP2" in refusal(
        write(tmp_path, **zero, parallelism_config=sizes)
    )
    for size in ("replicate", "shard"):
        sizes = {f"parallelism_config_dp_{size}_size": 0}
        assert f"dp_{size}_size of the accelerate config is 0, but it must be a whole" in refusal(
            write(tmp_path, **FSDP, parallelism_config=sizes)
        )


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (
            {**FSDP, "deepspeed_config": {"zero_stage": 3}},
            "deepspeed_config, which counts with distributed_type DEEPSPEED only",
        ),
        (
            {**FSDP, "distributed_type": "NO"},
            "fsdp_config, which counts with distributed_type FSDP only",
        ),
        ({**FSDP, "use_cpu": "false"}, "use_cpu is 'false', but it must be true or false"),
        (
            {**FSDP, "compute_environment": "AMAZON_SAGEMAKER"},
            "compute_environment AMAZON_SAGEMAKER, which is not supported",
        ),
    ],
)
def test_what_accelerate_would_leave_out_is_refused(
    values: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    path = write(tmp_path, **values)
    found = refusal(path)
    assert str(path) in found
    assert sentence in found


def test_what_accelerate_launch_refuses_is_refused_before(tmp_path: Path) -> None:
    check_accepted(write(tmp_path, **FSDP), 2)
    section = {"fsdp_cpu_ram_efficient_loading": True, "fsdp_sync_module_states": False}
    unsynchronised = write(tmp_path, distributed_type="FSDP", fsdp_config=section)
    with pytest.raises(UserError, match=r"`accelerate launch` refuses .*fsdp_sync_module_states"):
        check_accepted(unsynchronised, 2)
    zero = {"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 2}}
    check_accepted(write(tmp_path, **zero), 2)
    with pytest.raises(UserError, match="Unknown mixed_precision mode: half"):
        check_accepted(write(tmp_path, **{**FSDP, "mixed_precision": "half"}), 2)


def test_keys_without_their_prefix_count_as_in_accelerate(tmp_path: Path) -> None:
    section = {"version": 2, "offload_params": True, "reshard_after_forward": "no"}
    found = asked(write(tmp_path, distributed_type="FSDP", fsdp_config=section))
    assert found == BackendSettings("fsdp2", offload="all", reshard=False)


def written_keys() -> dict[str, set[str]]:
    """Every key that `accelerate config` may write into a section, from its source."""
    found: dict[str, set[str]] = {}
    for node in ast.walk(ast.parse(inspect.getsource(accelerate.commands.config.cluster))):
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name):
            key = node.slice
            if isinstance(key, ast.BinOp) and isinstance(key.right, ast.Constant):  # prefix + key
                found.setdefault(node.value.id, set()).add(f"{node.value.id}_{key.right.value}")
            elif isinstance(key, ast.Constant):
                found.setdefault(node.value.id, set()).add(str(key.value))
    return found


def test_what_accelerate_itself_writes_passes(tmp_path: Path) -> None:
    sections = {name: dict.fromkeys(keys, 1) for name, keys in written_keys().items()}
    assert sections.keys() > {"fsdp_config", "deepspeed_config", "parallelism_config"}
    assert len(sections["fsdp_config"]) > 10
    assert len(sections["parallelism_config"]) > 4
    known = {name: section for name, section in sections.items() if name.endswith("_config")}
    for kind, other in (("FSDP", "deepspeed_config"), ("DEEPSPEED", "fsdp_config")):
        whole = ClusterConfig(
            compute_environment="LOCAL_MACHINE", distributed_type=kind, mixed_precision="no",
            use_cpu=False, debug=False, **{**known, other: {}},
        )  # fmt: skip
        path = tmp_path / f"{kind}.yaml"
        whole.to_yaml_file(path)
        check_keys(path, kind)
        whole.to_json_file(path.with_suffix(".json"))
        check_keys(path.with_suffix(".json"), kind)
    basic = tmp_path / "basic.yaml"
    assert write_basic_config(mixed_precision="no", save_location=str(basic))
    check_keys(basic, "NO")


def test_former_keys_that_accelerate_converts_pass(tmp_path: Path) -> None:
    path = write(tmp_path, **FSDP, fp16=False, dynamo_backend="NO")
    assert asked(path) == BackendSettings("fsdp2")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            {"zero_optimization": {"stage": 3, "overlap_com": True}},
            'no key zero_optimization.overlap_com (did you mean "zero_optimization.overlap_comm"?)',
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"devise": "cpu"}}},
            'mean "zero_optimization.offload_optimizer.device"?',
        ),
        ({**CLIPPED, "gradient_cliping": 0.3}, 'no key gradient_cliping (did you mean "gradient_c'),
        ('{"zero_optimization": {"stage": 3, "stage": 2}}', "the key stage occurs twice"),
        ([1], "gives no ZeRO stage of 1, 2 or 3 (null); set zero_optimization.stage"),
        ({"zero_optimization": {"stage": "2"}}, 'gives no ZeRO stage of 1, 2 or 3 ("2")'),
        ({"zero_optimization": {"stage": True}}, "gives no ZeRO stage of 1, 2 or 3 (true)"),
        ("{", "is not JSON (Expecting property name"),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": "cpu"}},
            'zero_optimization.offload_optimizer is "cpu", but it must be an object such as',
        ),
    ],
)
def test_a_key_that_deepspeed_does_not_know_is_refused(
    settings: object, sentence: str, tmp_path: Path
) -> None:
    found = refusal(with_json(tmp_path, settings))
    assert str(tmp_path / "DeepSpeed.json") in found
    assert sentence in found


def test_accelerates_answer_for_no_json(tmp_path: Path) -> None:
    """`accelerate config` writes "none" if the question for the file is not answered."""
    section = {"deepspeed_config_file": "none", "zero_stage": 3}
    path = write(tmp_path, distributed_type="DEEPSPEED", deepspeed_config=section)
    assert asked(path) == BackendSettings("deepspeed", zero_stage=3)
    section["deepspeed_config_file"] = "nowhere.json"
    assert "nowhere.json cannot be read (No such file or directory); correct deep" in refusal(
        write(tmp_path, distributed_type="DEEPSPEED", deepspeed_config=section)
    )


def test_two_devices_contradict_each_other(tmp_path: Path) -> None:
    settings = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "none"}}}
    environment = backend_environment(with_json(tmp_path, settings))
    asked_too = environment | {"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"}
    with pytest.raises(UserError, match=r"offload_optimizer_device to cpu but .* to none; remove"):
        backend_settings(asked_too)


def test_two_stages_contradict_each_other(tmp_path: Path) -> None:
    environment = backend_environment(with_json(tmp_path, CLIPPED))
    with pytest.raises(UserError, match=r"asks for ZeRO 2 and .* for another stage"):
        backend_settings(environment | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"})


def training(**values: Any) -> TrainingConfig:
    return TrainingConfig(tokens=1, **values)


def unused(path: Path, **values: Any) -> list[str]:
    return not_used(asked(path).agreed(training(**values)).others, training(**values))


@pytest.mark.parametrize(
    ("settings", "theirs", "ours"),
    [
        ({"gradient_clipping": 0.3}, "gradient_clipping to 0.3", "optimizer.clip is 1.0"),
        ({"train_batch_size": 64}, "train_batch_size to 64", "global_batch_size is 256"),
        (
            {"train_micro_batch_size_per_gpu": 2},
            "train_micro_batch_size_per_gpu to 2",
            "micro_batch_size is 1",
        ),
        ({"fp16": {"enabled": True}}, "fp16.enabled to True", "precision is bf16"),
        ({"bf16": {"enabled": False}}, "bf16.enabled to False", "precision is bf16"),
        ({"optimizer": {"type": "Muon"}}, "optimizer.type to Muon", "optimizer is AdamW"),
        (
            {"optimizer": {"type": "Adam", "params": {"adam_w_mode": False}}},
            "adam_w_mode to False",
            "optimizer is AdamW",
        ),
        (
            {"optimizer": {"params": {"lr": 1e-3}}},
            "optimizer.params.lr to 0.001",
            "learning_rate is 2e-05",
        ),
        (
            {"optimizer": {"params": {"betas": [0.9, 0.999]}}},
            "betas to [0.9, 0.999]",
            "beta1 0.9 and beta2 0.95",
        ),
        (
            {"optimizer": {"params": {"weight_decay": 0}}},
            "optimizer.params.weight_decay to 0",
            "weight_decay is 0.1",
        ),
    ],
)
def test_a_value_that_contradicts_the_recipe_is_refused(
    settings: dict[str, Any], theirs: str, ours: str, tmp_path: Path
) -> None:
    path = with_json(tmp_path, {"zero_optimization": {"stage": 3}, **settings})
    with pytest.raises(UserError) as refused:
        asked(path).agreed(training())
    assert str(tmp_path / "DeepSpeed.json") in str(refused.value)
    assert theirs in str(refused.value)
    assert ours in str(refused.value)


def test_values_equal_to_the_recipes_pass_and_others_are_named(tmp_path: Path) -> None:
    optimizer = {"lr": "2e-5", "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": "auto"}
    same = {
        "zero_optimization": {"stage": 3}, "gradient_clipping": 1, "train_batch_size": "auto",
        "bf16": {"enabled": "auto"}, "fp16": {"enabled": False, "loss_scale": 0},
        "optimizer": {"type": "Adam", "params": {**optimizer, "adam_w_mode": True}},
    }  # fmt: skip
    assert unused(with_json(tmp_path, same)) == ["fp16"]
    other = {
        "zero_optimization": {"stage": 3}, "gradient_accumulation_steps": 4,
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 5}}, "steps_per_print": 9,
    }  # fmt: skip
    assert unused(with_json(tmp_path, other)) == [
        "gradient_accumulation_steps 4 (training.global_batch_size 256)",
        "scheduler.type WarmupLR (training.schedule.shape cosine)",
        "scheduler.params.warmup_num_steps 5 (training.schedule.shape cosine)",
        "steps_per_print",
    ]


def test_accelerates_own_keys_are_compared_too(tmp_path: Path) -> None:
    section = {"zero_stage": 2, "gradient_clipping": 0.5, "gradient_accumulation_steps": 1}
    path = write(tmp_path, distributed_type="DEEPSPEED", deepspeed_config=section)
    with pytest.raises(UserError, match=r"gradient_clipping to 0.5 but training.optimizer.clip is"):
        asked(path).agreed(training())
    assert unused(path, optimizer={"clip": 0.5}) == [
        "gradient_accumulation_steps 1 (training.global_batch_size 256)"
    ]
    compiled = write(tmp_path, **FSDP, dynamo_config={"dynamo_backend": "INDUCTOR"})
    assert unused(compiled) == ["dynamo_config.dynamo_backend inductor (training.compile false)"]
    assert not unused(write(tmp_path, **FSDP, dynamo_config={"dynamo_backend": "NO"}))


@pytest.mark.filterwarnings("ignore:Port")
def test_the_variables_are_those_of_accelerate_launch(tmp_path: Path) -> None:
    """What torchrun's processes read themselves is what `accelerate launch` tells its own."""
    section = {
        "zero_stage": 2, "gradient_clipping": 0.5, "gradient_accumulation_steps": 3,
        "offload_optimizer_device": "cpu",
    }  # fmt: skip
    path = write(tmp_path, distributed_type="DEEPSPEED", deepspeed_config=section, num_processes=2)
    arguments = ["--config_file", str(path), "-m", "module"]
    settings, _, _ = _validate_launch_command(launch_command_parser().parse_args(arguments))
    settings.deepspeed_fields_from_accelerate_config = ""
    _, theirs = prepare_deepspeed_cmd_env(settings)
    ours = backend_environment(path)
    del ours["ACCELERATE_USE_CPU"]  # not passed on by accelerate
    assert {name: theirs[name] for name in ours} == ours


@pytest.mark.parametrize("command", ["plan", "run"])
def test_a_misspelt_key_ends_the_command(command: str, recipe_path: Path, tmp_path: Path) -> None:
    section = {"fsdp_version": 2, "fsdp_offload_param": True}
    path = write(tmp_path, distributed_type="FSDP", fsdp_config=section)
    done = cpt_merge(
        command, recipe_path, f"launch.accelerate_config={path}", f"runs={tmp_path / 'runs'}"
    )
    assert done.returncode == 2
    assert 'mean "fsdp_offload_params"?' in done.stderr


def test_the_file_that_accelerate_launch_was_given(tmp_path: Path) -> None:
    command_line = tmp_path / "cmdline"

    def launched(*words: str) -> Path | None:
        command_line.write_text("\0".join([*words, ""]))
        return _launched_file(command_line)

    started = ("/usr/bin/python", "/bin/accelerate", "launch")
    assert launched(*started, "--config_file", "a.yaml", "-m", "x") == Path("a.yaml")
    assert launched(*started, "--config-file=a.yaml", "-m", "x") == Path("a.yaml")
    module = ("python", "-m", "accelerate.commands.launch")
    assert launched(*module, "--config_file", "a.yaml", "x.py") == Path("a.yaml")
    default = launched(*started, "-m", "x")
    assert default is not None
    assert default.name == "default_config.yaml"
    assert launched("python", "-m", "cpt_merge", "run", "accelerate.yaml") is None
    assert _launched_file(tmp_path / "nowhere") is None


@pytest.mark.slow
def test_several_processes_on_cpus_without_a_backend_are_refused(tmp_path: Path) -> None:
    """`accelerate launch` would start only one of them, and nothing would say so."""
    path = write(tmp_path, distributed_type="MULTI_CPU", num_processes=2, use_cpu=True)
    check = "import cpt_merge.launcher.accelerate_file as file; file.apply_launched_file()"
    # a parent whose command line is that of accelerate, as the stage sees it
    parent = f"import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', {check!r}]))"
    script = tmp_path / "accelerate"
    script.write_text(parent)
    words = [sys.executable, str(script), "launch", "--config_file", str(path)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 1
    assert "asks for distributed_type MULTI_CPU; set FSDP" in done.stderr


def test_a_command_on_one_machine_refuses_a_file_for_two(
    recipe_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(machines: object) -> None:
        path = write(tmp_path, **FSDP, num_machines=machines, num_processes=4)
        check_one_machine(load_recipe(recipe_path, [f"launch.accelerate_config={path}"]))

    check(1)
    with pytest.raises(UserError, match=r"num_machines: 2, .* this machine alone"):
        check(2)
    with pytest.raises(UserError, match="num_machines is two, but it must be a whole number"):
        check("two")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "0")
    check(2)  # torchrun has started all of them


def test_every_packaged_file_has_known_keys() -> None:
    found = {path.stem: backend_environment(path) for path in ACCELERATE_CONFIGS.glob("*.yaml")}
    assert {"fsdp2", "zero2", "zero3"} <= found.keys()
