"""Every configuration of recipes/accelerate starts what its name says, by accelerate and by torchrun."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

import cpt_merge.training.trainable
from cpt_merge.core.artifact import write_json
from cpt_merge.core.errors import UserError
from cpt_merge.core.world import World
from cpt_merge.launcher.accelerate_file import backend_environment
from cpt_merge.launcher.heavy_checks import _check_training
from cpt_merge.launcher.run import Run
from cpt_merge.launcher.stage import prepare
from cpt_merge.launcher.stages import TRAINING
from cpt_merge.training.config import Offload
from cpt_merge.training.distributed.checkpoint import TrainState
from cpt_merge.training.distributed.settings import BackendSettings, backend_settings
from tests.command_line import cpt_merge as command_line
from tests.launcher.conftest import ROOT

CONFIGS = ROOT / "recipes" / "accelerate"
CPU = {"device": "cpu"}
ASKED = {
    "fsdp2": BackendSettings("fsdp2"),
    "hsdp": BackendSettings("fsdp2", replicas=2, shards=2),
    "zero1": BackendSettings("deepspeed", zero_stage=1),
    "zero2": BackendSettings("deepspeed", zero_stage=2),
    "zero3": BackendSettings("deepspeed", zero_stage=3),
    "fsdp2-offload": BackendSettings("fsdp2", offload="all"),
    "zero2-offload": BackendSettings(
        "deepspeed", zero_stage=2, offload="optimizer", zero={"offload_optimizer": CPU}
    ),
    "zero3-offload": BackendSettings(
        "deepspeed", zero_stage=3, offload="all",
        zero={"offload_optimizer": CPU, "offload_param": CPU},
    ),
    "cpu": BackendSettings(use_cpu=True),
}  # fmt: skip
ACTIVE = {
    "fsdp2": (2, "FSDP2: 2 shards, 2 processes"),
    "hsdp": (4, "HSDP: 2 replicas of 2 shards, 4 processes"),
    "zero1": (2, "DeepSpeed ZeRO 1: optimizer divided over 2 processes"),
    "zero2": (2, "DeepSpeed ZeRO 2: optimizer and gradients divided over 2 processes"),
    "zero3": (2, "DeepSpeed ZeRO 3: optimizer, gradients and parameters divided over 2 processes"),
    "fsdp2-offload": (
        2,
        "FSDP2: 2 shards, 2 processes; weights, gradients and optimizer in the CPU's memory, "
        "where everything is on a CPU machine",
    ),
    "zero2-offload": (2, "gradients divided over 2 processes; optimizer in the CPU's memory"),
    "zero3-offload": (2, "divided over 2 processes; optimizer and weights in the CPU's memory"),
    "cpu": (1, "one process, not sharded"),
}


@pytest.mark.parametrize("name", ASKED)
def test_a_file_read_by_the_processes_says_what_accelerate_says(name: str) -> None:
    assert backend_settings(backend_environment(CONFIGS / f"{name}.yaml")) == ASKED[name]


@pytest.mark.parametrize(
    ("processes", "config", "expected"),
    [(1, None, "none"), (2, None, "fsdp2"), (1, "zero2", "deepspeed"), (2, "cpu", "none")],
)
def test_what_is_checked_early_is_the_backend_that_processes_will_have(
    recipe_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int, config: str, expected: str
) -> None:
    """Each has its own refusals: rows that cannot be divided, documents one by one."""
    seen: list[BackendSettings] = []

    def stop(base: Path, training: object, asked: BackendSettings, *rest: object) -> None:
        seen.append(asked)
        raise UserError("enough")

    monkeypatch.setattr(cpt_merge.training.trainable, "check_trainable", stop)
    overrides = [f"launch.accelerate_config={config}"] if config else []
    run = Run.load(recipe_path, [f"launch.processes={processes}", *overrides])
    with pytest.raises(UserError, match="enough"):
        _check_training(run, TRAINING, run.recipe.training, here=True)
    assert [one.backend for one in seen] == [expected]


@pytest.mark.parametrize(
    ("key", "layout", "sentence"),
    [
        (None, "DeepSpeed, with moments in 8 bits", "cannot be loaded by torch; continue with the"),
        (None, "DeepSpeed ZeRO 2 on 2 processes", "an earlier version .* or remove .*checkpoints"),
        ("of other settings", "DeepSpeed ZeRO 2 on 2 processes", "enough"),
    ],
)
def test_a_checkpoint_that_the_backend_cannot_load_is_refused_early(
    key: str | None, layout: str, sentence: str, finished: Path, recipe_path: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A run with other settings starts again, whatever its old folder holds."""
    shutil.copytree(finished, tmp_path / "tiny", ignore=shutil.ignore_patterns("training", "merge"))
    settings = [f"runs={tmp_path}", "training.optimizer.moments=8bit", "launch.processes=2"]
    run = Run.load(recipe_path, settings)
    state = TrainState(key or prepare(run, TRAINING).key, layout=layout)
    checkpoint = run.folder("training") / "checkpoints" / "step-00000002"
    checkpoint.mkdir(parents=True)
    write_json(checkpoint / "train_state.json", asdict(state))
    monkeypatch.setattr(cpt_merge.training.trainable, "check_trainable", enough)
    with pytest.raises(UserError, match=sentence):
        _check_training(run, TRAINING, run.recipe.training, here=True)


def enough(*_: object) -> None:
    raise UserError("enough")


@pytest.mark.slow
@pytest.mark.parametrize("name", ASKED)
def test_accelerate_says_the_same(name: str, tmp_path: Path) -> None:
    script = tmp_path / "dump.py"
    script.write_text(
        "import json, os, sys\n"
        "if os.environ.get('RANK', '0') == '0': json.dump(dict(os.environ), open(sys.argv[1], 'w'))\n"
    )
    out = tmp_path / "environment.json"
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(CONFIGS / f"{name}.yaml"),
    ]
    subprocess.run([*command, str(script), str(out)], check=True, capture_output=True, timeout=120)
    environment = json.loads(out.read_text())
    if name == "cpu":
        environment = {
            key: value for key, value in environment.items() if key not in ("RANK", "WORLD_SIZE")
        }
    assert backend_settings(environment) == ASKED[name]


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"},
            "asks for FSDP 1; set fsdp_version: 2",
        ),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "PARALLELISM_CONFIG_TP_SIZE": "2"},
            "tp_size > 1",
        ),
        (
            {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"},
            "ZeRO stage 0",
        ),
        (
            {
                "ACCELERATE_USE_DEEPSPEED": "true",
                "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
                "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu",
            },
            "asks for offload_param without offload_optimizer",
        ),
    ],
)
def test_what_is_not_there_is_refused(environment: dict[str, str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        backend_settings(environment)


def test_several_processes_need_a_backend() -> None:
    with pytest.raises(UserError, match="2 processes need a backend"):
        BackendSettings().mesh_shape(World(size=2))


def of_json(tmp_path: Path, **section: object) -> BackendSettings:
    """The settings of a DeepSpeed JSON."""
    settings = tmp_path / "deepspeed.json"
    settings.write_text(json.dumps({"zero_optimization": section}))
    environment = {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(settings),
    }
    return backend_settings(environment)


def test_deepspeeds_own_file_counts_with_all_its_fields(tmp_path: Path) -> None:
    optimizer = {"device": "cpu", "pin_memory": False, "buffer_count": "auto"}
    asked = of_json(
        tmp_path, stage=2, overlap_comm=False, reduce_bucket_size="auto",
        offload_optimizer=optimizer, offload_param={"device": "none"},
    )  # fmt: skip
    assert asked.zero_section == {
        "stage": 2, "overlap_comm": False,
        "offload_optimizer": {"device": "cpu", "pin_memory": False},
    }  # fmt: skip
    assert (asked.zero_stage, asked.offload) == (2, "optimizer")
    assert of_json(tmp_path, stage=3, offload_optimizer=None).offload == "none"
    with pytest.raises(UserError, match="sets cpu_offload, a former name of DeepSpeed's"):
        of_json(tmp_path, stage=2, cpu_offload=True)
    with pytest.raises(UserError, match="gives no ZeRO stage of 1, 2 or 3"):
        of_json(tmp_path, stage=0)


ZERO_CPU = {"offload_optimizer": CPU, "offload_param": CPU}


@pytest.mark.parametrize(
    ("asked", "wanted", "found"),
    [
        (BackendSettings("fsdp2"), "all", BackendSettings("fsdp2", offload="all")),
        (BackendSettings("fsdp2", offload="all"), None, BackendSettings("fsdp2", offload="all")),
        (BackendSettings("fsdp2"), "none", BackendSettings("fsdp2")),
        (
            BackendSettings("deepspeed", zero_stage=1),
            "optimizer",
            BackendSettings(
                "deepspeed", zero_stage=1, offload="optimizer",
                zero={"offload_optimizer": {"device": "cpu"}},
            ),
        ),
        (
            BackendSettings("deepspeed", zero_stage=3, zero={"overlap_comm": False}),
            "all",
            BackendSettings(
                "deepspeed", zero_stage=3, offload="all", zero={"overlap_comm": False, **ZERO_CPU}
            ),
        ),
    ],
)  # fmt: skip
def test_recipe_or_file_asks_to_offload(
    asked: BackendSettings, wanted: Offload | None, found: BackendSettings
) -> None:
    assert asked.with_offload(wanted) == found
    assert found.with_offload(wanted) == found


@pytest.mark.parametrize(
    ("asked", "wanted", "sentence"),
    [
        (
            BackendSettings(),
            "all",
            "all needs FSDP2 or ZeRO 3, on one process too; set launch.accelerate_config to fsdp2 "
            "or zero3, or leave training.offload out",
        ),
        (
            BackendSettings(),
            "optimizer",
            "optimizer needs DeepSpeed, on one process too; set launch.accelerate_config to zero1, "
            "zero2 or zero3, or",
        ),
        (BackendSettings("fsdp2"), "optimizer", "not possible with FSDP2, which offloads weights"),
        (
            BackendSettings("fsdp2", offload="all"),
            "optimizer",
            "set all, or set launch.accelerate_config to zero1, zero2 or zero3",
        ),
        (
            BackendSettings("fsdp2", offload="all"),
            "none",
            "none would offload nothing, but the accelerate config asks to offload weights, "
            "gradients and optimizer; leave training.offload out, or remove",
        ),
        (
            BackendSettings("deepspeed", zero_stage=2, offload="optimizer"),
            "all",
            "cannot be offloaded with ZeRO 2, which runs with whole ones; offload the optimizer "
            "alone, or set launch.accelerate_config to fsdp2 or zero3",
        ),
        (
            BackendSettings("deepspeed", zero_stage=3, offload="optimizer"),
            "all",
            "all would offload weights, gradients and optimizer, but the accelerate config asks to "
            "offload the optimizer",
        ),
        (
            BackendSettings("deepspeed", zero_stage=2),
            "all",
            "weights cannot be offloaded with ZeRO 2",
        ),
        (
            BackendSettings("deepspeed", zero_stage=2, zero=ZERO_CPU, offload="all"),
            None,
            "weights cannot be offloaded with ZeRO 2",
        ),
    ],
)
def test_what_cannot_be_offloaded_is_one_sentence(
    asked: BackendSettings, wanted: Offload | None, sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        asked.with_offload(wanted)


@pytest.mark.slow
@pytest.mark.parametrize("name", ACTIVE)
@pytest.mark.parametrize("launcher", ["accelerate", "torchrun"])
def test_it_trains_and_merges(
    name: str, launcher: str, finished: Path, recipe_path: Path, tmp_path: Path
) -> None:
    """`accelerate launch --config_file ... -m cpt_merge.training RECIPE`, and torchrun with the file named in the recipe."""
    processes, active = ACTIVE[name]
    run = tmp_path / "runs" / "tiny"
    shutil.copytree(finished, run, ignore=shutil.ignore_patterns("training", "merge"))
    config = str(CONFIGS / f"{name}.yaml")
    arguments = ["-m", "cpt_merge.training", str(recipe_path), f"runs={tmp_path / 'runs'}"]
    if launcher == "accelerate":
        start = [
            "accelerate.commands.launch",
            "--config_file",
            config,
            "--num_processes",
            str(processes),
        ]
    else:
        start = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        arguments.append(f"launch.accelerate_config={config}")
    done = subprocess.run(
        [sys.executable, "-m", *start, *arguments], capture_output=True, text=True, timeout=300, cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert active in done.stderr
    for stage in ("training", "merge"):
        assert (run / stage / "stage.json").is_file()
    assert (run / "merge" / "chat" / "model.safetensors").is_file()


@pytest.mark.slow
def test_one_process_of_a_recipe_that_names_deepspeed(
    finished: Path, recipe_path: Path, tmp_path: Path
) -> None:
    run = tmp_path / "runs" / "tiny"
    shutil.copytree(finished, run, ignore=shutil.ignore_patterns("training", "merge"))
    config = f"launch.accelerate_config={CONFIGS / 'zero2.yaml'}"
    done = command_line(
        "train", recipe_path, f"runs={tmp_path / 'runs'}", config, "launch.processes=1"
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "DeepSpeed ZeRO 2: optimizer and gradients divided over 1 process" in done.stderr
