"""Keys of accelerate's and DeepSpeed's files are those of the installed libraries, and no others."""

import ast
import inspect
import json
from pathlib import Path
from typing import Any

import accelerate.commands.config.cluster
import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig
from accelerate.commands.config.default import write_basic_config

from cpt_merge.core.errors import UserError
from cpt_merge.launcher.accelerate_file import (
    ACCELERATE_CONFIGS,
    _launched_file,
    backend_environment,
    check_keys,
)
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
    whole = ClusterConfig(
        compute_environment="LOCAL_MACHINE", distributed_type="FSDP", mixed_precision="no",
        use_cpu=False, debug=False, **known,
    )  # fmt: skip
    path = tmp_path / "written.yaml"
    whole.to_yaml_file(path)
    check_keys(path)
    whole.to_json_file(tmp_path / "written.json")
    check_keys(tmp_path / "written.json")
    basic = tmp_path / "basic.yaml"
    assert write_basic_config(mixed_precision="no", save_location=str(basic))
    check_keys(basic)


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
    ],
)
def test_a_key_that_deepspeed_does_not_know_is_refused(
    settings: object, sentence: str, tmp_path: Path
) -> None:
    found = refusal(with_json(tmp_path, settings))
    assert str(tmp_path / "DeepSpeed.json") in found
    assert sentence in found


def test_two_stages_contradict_each_other(tmp_path: Path) -> None:
    environment = backend_environment(with_json(tmp_path, CLIPPED))
    with pytest.raises(UserError, match=r"asks for ZeRO 2 and .* for another stage"):
        backend_settings(environment | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"})


def test_what_the_recipe_decides_instead_is_named(tmp_path: Path) -> None:
    assert asked(with_json(tmp_path, CLIPPED)).unused == ("gradient_clipping",)
    compiled = write(tmp_path, **FSDP, dynamo_config={"dynamo_backend": "INDUCTOR"})
    assert asked(compiled).unused == ("dynamo_config",)
    not_compiled = write(tmp_path, **FSDP, dynamo_config={"dynamo_backend": "NO"})
    assert asked(not_compiled).unused == ()


@pytest.mark.parametrize("command", ["plan", "run"])
def test_a_misspelt_key_ends_the_command(command: str, recipe_path: Path, tmp_path: Path) -> None:
    section = {"fsdp_version": 2, "fsdp_offload_param": True}
    path = write(tmp_path, distributed_type="FSDP", fsdp_config=section)
    done = cpt_merge(command, recipe_path, f"launch.accelerate_config={path}")
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


def test_every_packaged_file_has_known_keys() -> None:
    for path in ACCELERATE_CONFIGS.glob("*.yaml"):
        backend_environment(path)
