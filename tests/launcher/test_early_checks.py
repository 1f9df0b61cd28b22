"""What would stop a late stage is refused by `plan` and `run` before any stage has written."""

import itertools
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, BertConfig, Gemma2Config

from tests.command_line import cpt_merge
from tests.merge.test_multimodal import mllama
from tests.training.families import GEMMA, SIZES
from tests.wrappers import make_wrapper


@dataclass(frozen=True)
class Broken:
    """One fault of a valid recipe."""

    sentence: str
    overrides: list[str] = field(default_factory=list)
    change: Callable[[Path], None] = lambda pair: None


def edit_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def cut_weights(pair: Path) -> None:
    path = pair / "chat" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def without_template(pair: Path) -> None:
    path = pair / "chat" / "tokenizer_config.json"
    values = json.loads(path.read_text())
    del values["chat_template"]
    path.write_text(json.dumps(values))


def without_tokenizer(pair: Path) -> None:
    for path in (pair / "base").glob("tokenizer*"):
        path.unlink()


def as_adapter(pair: Path) -> None:
    (pair / "chat" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))


def of_family(kind: type, **values: object) -> Callable[[Path], None]:
    """Give both models another architecture."""

    def change(pair: Path) -> None:
        for name in ("base", "chat"):
            rows = json.loads((pair / name / "config.json").read_text())["vocab_size"]
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(kind(**{**values, "vocab_size": rows}))
            model.to(torch.bfloat16).save_pretrained(pair / name)

    return change


def without_a_tower_tensor(name: str) -> Callable[[Path], None]:
    """Make wrappers of the pair, of which one lacks a tensor that nothing here trains or merges."""

    def change(pair: Path) -> None:
        for number, each in enumerate(("base", "chat")):
            rows = json.loads((pair / each / "config.json").read_text())["vocab_size"]
            make_wrapper(pair / each, "gemma3", False, number, rows)
        file = pair / name / "model.safetensors"
        save_file({key: v for key, v in load_file(file).items() if key != TOWER_TENSOR}, file)

    return change


def as_mllama(pair: Path) -> None:
    for name in ("base", "chat"):
        mllama().to(torch.bfloat16).save_pretrained(pair / name)


TOWER_TENSOR = "multi_modal_projector.mm_soft_emb_norm.weight"
LIGHT = {
    "truncated weights of the chat model": Broken("model.safetensors", change=cut_weights),
    "layers through which no text passes": Broken("has layers for images alone", change=as_mllama),
    "no weights of the chat model": Broken(
        "contains neither model.safetensors",
        change=lambda pair: (pair / "chat" / "model.safetensors").unlink(),
    ),
    "no tokenizer of the base": Broken(
        "tokenizer", change=lambda pair: (pair / "base" / "tokenizer.model").unlink()
    ),
    "no tokenizer of the base that keeps its own": Broken(
        "has no tokenizer (tokenizer.json or tokenizer.model)",
        ["tokenizer.new_pieces={}"],
        without_tokenizer,
    ),
    "a chat model that is an adapter": Broken("adapter", change=as_adapter),
    "a chat model in GPTQ": Broken(
        "GPTQ",
        change=lambda pair: edit_json(
            pair / "chat" / "config.json", quantization_config={"quant_method": "gptq", "bits": 4}
        ),
    ),
    "longer than the positions": Broken(
        "training.sequence_length = 512 but the model has 256 positions",
        ["training.sequence_length=512", "training.tokens=1_000_000"],
    ),
    "new rows without pieces": Broken(
        "training.phases names new_rows but there will be none",
        ["tokenizer.new_pieces={}", "training.phases=[{train: new_rows}]"],
    ),
    "a disk that is too small": Broken(
        "GB left and the run takes", ["training.checkpoints.keep=1_000_000_000_000"]
    ),
    "a vector that is not there": Broken(
        "merge.vectors.0.vector = /nowhere does not exist", ["merge.vectors=[{vector: /nowhere}]"]
    ),
    "a rule that no tensor follows": Broken(
        "nonsense", ["merge.rules=[{pattern: nonsense, action: skip}]"]
    ),
    "a prompts file that is not there": Broken(
        "evaluation.instructions = /nowhere.jsonl does not exist",
        ["evaluation.instructions=/nowhere.jsonl"],
    ),
    "text that is not there": Broken(
        "text source /nowhere.jsonl does not exist", ["corpus.sources.0.path=/nowhere.jsonl"]
    ),
    "online without a key": Broken("no API key", ["tracking.mode=online"]),
}

HEAVY = {
    "a capped model with flash": Broken(
        "caps its attention scores; set auto",
        ["training.attention=flash"],
        of_family(Gemma2Config, **{**GEMMA, "max_position_embeddings": 256}),
    ),
    "a tower's tensor that the base lacks": Broken(
        f"base lacks {TOWER_TENSOR} of Gemma3ForConditionalGeneration, which transformers would "
        "fill with random values",
        change=without_a_tower_tensor("base"),
    ),
    "a tower's tensor that the chat model lacks": Broken(
        f"chat lacks {TOWER_TENSOR} of Gemma3For", change=without_a_tower_tensor("chat")
    ),
    "no chat template": Broken("has no chat template", change=without_template),
    "an encoder": Broken(
        "such models cannot be trained",
        ["training.attention=eager", "tokenizer.new_pieces={}"],
        of_family(BertConfig, **{**SIZES, "max_position_embeddings": 256, "is_decoder": False}),
    ),
    "fp8 without a GPU": Broken("training.fp8 needs", ["training.fp8=true"]),
    "an optimizer that FSDP2 cannot offload alone": Broken(
        "not possible with FSDP2",
        ["launch.accelerate_config=fsdp2", "training.offload=optimizer"],
    ),
    "a process that has nothing to offload with": Broken(
        "needs FSDP2 or ZeRO 3, on one process too",
        ["launch.processes=1", "launch.accelerate_config=cpu", "training.offload=all"],
    ),
    "a backend that contradicts the recipe": Broken(
        "DeepSpeed", ["launch.accelerate_config=zero2", "training.precision=pure-bf16"]
    ),
}


@pytest.fixture
def own_pair(pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the pair to break; no key of W&B is known."""
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb"))
    return Path(shutil.copytree(pair, tmp_path / "pair"))


def refused(command: str, recipe_path: Path, pair: Path, broken: Broken) -> None:
    broken.change(pair)
    runs = pair.parent / "runs"
    models = [f"models.{name}={pair / name}" for name in ("base", "chat")]
    done = cpt_merge(command, recipe_path, f"runs={runs}", *models, *broken.overrides)
    assert done.returncode == 2, done.stdout + done.stderr
    assert broken.sentence in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert "──" not in done.stderr, "a stage has begun"
    assert done.stdout == ""
    assert not runs.exists()


@pytest.mark.parametrize(
    ("name", "command"),
    [
        pytest.param(name, command, marks=pytest.mark.slow if command == unusual else [])
        for name, unusual in zip(LIGHT, itertools.cycle(("plan", "run")), strict=False)
        for command in ("plan", "run")
    ],
)
def test_it_is_refused_before_the_first_stage(
    name: str, command: str, recipe_path: Path, own_pair: Path
) -> None:
    refused(command, recipe_path, own_pair, LIGHT[name])


@pytest.mark.parametrize(
    ("name", "command"),
    [
        pytest.param(
            name, ("plan", "run")[number % 2], marks=pytest.mark.slow if number > 0 else []
        )
        for number, name in enumerate(HEAVY)
    ],
)
def test_what_only_transformers_can_tell_is_refused_as_early(
    name: str, command: str, recipe_path: Path, own_pair: Path
) -> None:
    refused(command, recipe_path, own_pair, HEAVY[name])


@pytest.mark.slow
@pytest.mark.parametrize("command", ["plan", "run"])
def test_prompts_that_cannot_be_read_are_named_by_line(
    command: str, recipe_path: Path, own_pair: Path, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"language": "ko"}\n')
    sentence = f'{prompts}, line 1: a prompt needs the fields "language" and "messages"'
    broken = Broken(sentence, [f"evaluation.prompts={prompts}"])
    refused(command, recipe_path, own_pair, broken)


@pytest.mark.parametrize("command", ["plan", "run"])
def test_a_folder_that_cannot_be_made(command: str, recipe_path: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = cpt_merge(command, recipe_path, f"runs={tmp_path / 'file' / 'runs'}")
    assert done.returncode == 2
    assert f"cannot be written ({tmp_path / 'file'} is not a directory)" in done.stderr


@pytest.mark.slow
def test_what_the_checks_say_is_not_lost(recipe_path: Path, own_pair: Path) -> None:
    for name in ("base", "chat"):
        edit_json(own_pair / name / "config.json", attention_dropout=0.1)
    models = [f"models.{name}={own_pair / name}" for name in ("base", "chat")]
    done = cpt_merge("plan", recipe_path, f"runs={own_pair.parent / 'runs'}", *models)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("attention_dropout of its config.json are ignored") == 1


def test_a_run_that_is_finished_is_not_checked_again(finished: Path, recipe_path: Path) -> None:
    """What would be refused now (a full disk, a lost compiler) does not matter any more."""
    done = cpt_merge("plan", recipe_path, "training.checkpoints.keep=1_000_000_000_000")
    assert done.returncode == 0, done.stderr
    assert AutoConfig.from_pretrained(finished / "merge" / "chat").model_type == "llama"


@pytest.mark.slow
def test_the_plan_shows_paths_as_they_are(recipe_path: Path, texts: Path) -> None:
    """Brackets are no markup, and a long path is on one line."""
    pattern = f"{texts}/[k]o.jsonl"
    done = cpt_merge("plan", recipe_path, f"corpus.sources.0.path={pattern}")
    assert f"text: {pattern} (" in done.stdout, done.stdout + done.stderr
