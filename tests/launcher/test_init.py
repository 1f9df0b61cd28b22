"""`cpt-merge init` writes a recipe that loads, says why, and passes its plan."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cpt_merge.core.errors import UserError
from cpt_merge.launcher.init import Options, init
from cpt_merge.launcher.inspection import guess_language, inspect_text, parse_machine
from cpt_merge.launcher.recipe import load_recipe
from tests.command_line import Done, cpt_merge

ENGLISH = "en=en.jsonl"
GPU = "1xrtx4090"  # the plan for a machine that is not here takes no time


@pytest.fixture
def here(tmp_path: Path, pair: Path, texts: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a pair and text, which is the current one."""
    for name in ("base", "chat"):
        (tmp_path / name).symlink_to(pair / name)
    for name in ("ko", "zh_tw", "en"):
        (tmp_path / f"{name}.jsonl").symlink_to(texts / f"{name}.jsonl")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def ask(*more: str, machine: str = GPU) -> Done:
    pair = ("--base", "base", "--chat", "chat")
    return cpt_merge("init", *pair, "--machine", machine, *more, "--out", "my.yaml")


def test_a_recipe_loads_and_passes_its_plan_and_every_choice_has_a_reason(here: Path) -> None:
    done = ask("--text", "ko=ko.jsonl", "--text", "zh_tw.jsonl", "--text", ENGLISH)
    assert done.returncode == 0, done.stderr
    assert "cpt-merge run my.yaml" in done.stdout + done.stderr
    recipe = load_recipe(here / "my.yaml", [])
    assert recipe.corpus.languages() == ["ko", "zh_tw", "en"]
    assert recipe.corpus.shares["en"] == 0.15
    assert set(recipe.tokenizer.new_pieces) == {"ko", "zh_tw"}
    assert [phase.train for phase in recipe.training.phases] == ["new_rows", "all"]
    assert recipe.training.sequence_length == 256, "the model has no more positions"
    optimizer = recipe.training.optimizer
    assert optimizer.embedding_learning_rate == 3 * optimizer.learning_rate
    lines = (here / "my.yaml").read_text(encoding="utf-8").splitlines()
    assert any("ko: the base takes" in line and line.startswith("  #") for line in lines)
    assert "warning" not in done.stdout + done.stderr


@pytest.mark.slow  # a whole run
def test_a_run_of_the_written_recipe_finishes(here: Path) -> None:
    assert ask("--text", "ko=ko.jsonl", "--text", ENGLISH, machine="cpu").returncode == 0
    small = ("training.tokens=4k", "evaluation.max_prompts=1", "evaluation.max_new_tokens=8")
    done = cpt_merge(
        "run", "my.yaml", *small, "training.phases.0.tokens=2k", "training.global_batch_size=2"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (here / "runs" / "my" / "merge" / "chat" / "config.json").is_file()


def test_without_english_text_init_plan_and_recipe_warn(here: Path) -> None:
    done = ask("--text", "ko=ko.jsonl")
    assert done.returncode == 0
    assert (done.stdout + done.stderr).count("there is no English text") == 2
    assert "# WARNING: there is no English text" in (here / "my.yaml").read_text(encoding="utf-8")


def test_a_file_is_only_replaced_when_asked(here: Path) -> None:
    (here / "my.yaml").write_text("mine", encoding="utf-8")
    done = ask("--text", "ko=ko.jsonl")
    assert done.returncode == 2
    assert "my.yaml exists" in done.stderr
    assert (here / "my.yaml").read_text(encoding="utf-8") == "mine"
    assert ask("--text", "ko=ko.jsonl", "--overwrite").returncode == 0
    assert load_recipe(here / "my.yaml", []).name == "my"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--text", "none.jsonl"), "text source none.jsonl does not exist"),
        (
            ("--text", "ko=zh_tw.jsonl"),
            "0% of the letters are Hangul, so it is not in ko; it looks",
        ),
        (("--text", "kr=ko.jsonl"), "language 'kr' is not known; use ko."),
        (("--text", ENGLISH), "there is only English text"),
        (("--text", "ko=ko.jsonl", "--machine", "1xfoo"), "the GPU 'foo' is not known"),
        (("--text", "ko=ko.jsonl", "--machine", "one"), "machine 'one' is none of this, cpu"),
        ((), "give --text; there is no terminal"),
    ],
)
def test_a_wrong_answer_is_one_sentence_and_writes_nothing(
    here: Path, options: tuple[str, ...], sentence: str
) -> None:
    done = ask(*options)
    assert done.returncode == 2
    assert sentence in " ".join(done.stderr.split())
    assert not (here / "my.yaml").exists()


def test_a_chat_model_of_another_base_is_doubted(here: Path) -> None:
    shutil.copytree(here / "chat", here / "stranger")
    weights = load_file(here / "stranger" / "model.safetensors")
    torch.manual_seed(1)
    random = {name: torch.randn_like(one) for name, one in weights.items()}
    save_file(random, here / "stranger" / "model.safetensors", metadata={"format": "pt"})
    done = cpt_merge(
        "init", "--base", "base", "--chat", "stranger", "--text", "ko=ko.jsonl", "--text", ENGLISH,
        "--machine", GPU,
    )  # fmt: skip
    assert "warning: " in done.stdout + done.stderr


def test_on_a_terminal_it_asks_until_an_answer_is_good(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter(["nowhere", "base", "chat", "ko=zh_tw.jsonl", "ko=ko.jsonl", ENGLISH, "",
                    "banana", GPU, "taken.yaml", ""])  # fmt: skip
    (here / "taken.yaml").touch()
    monkeypatch.setattr("builtins.input", lambda question: next(answers))
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    init(Options(None, None, [], None, None, overwrite=False))
    assert list(answers) == []
    assert load_recipe(here / "base-ko.yaml", []).corpus.languages() == ["ko", "en"]


@pytest.mark.parametrize("ending", [KeyboardInterrupt, EOFError])
def test_ctrl_c_and_ctrl_d_write_nothing(
    here: Path, monkeypatch: pytest.MonkeyPatch, ending: type[BaseException]
) -> None:
    def stop(question: str) -> str:
        raise ending

    monkeypatch.setattr("builtins.input", stop)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    with pytest.raises(SystemExit) as end:
        init(Options("base", None, [], None, None, overwrite=False))
    assert end.value.code == 130
    assert list(here.glob("*.yaml")) == []


def test_machines() -> None:
    assert parse_machine("8 x H100").ranks == 8
    cluster = parse_machine("slurm:2x8xrtx4090")
    assert (cluster.gpu, cluster.nodes, cluster.gpus, cluster.slurm) == ("rtx4090", 2, 8, True)
    assert parse_machine("cpu").ranks == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine without a GPU")
def test_a_login_node_without_gpus_asks_for_those_of_its_nodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sbatch").write_text("#!/bin/sh\n")
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="has Slurm and no GPU; name those of its nodes, such as"):
        parse_machine("this")


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("오늘은 날씨가 좋습니다.", "ko"),
        ("這個問題很簡單,我們來說說看吧。", "zh_tw"),
        ("这个问题很简单,我们来说说看吧。", "zh_cn"),
        ("今日はとても良い天気ですね。", "ja"),
        ("The weather is nice.", "en"),
        ("Сегодня хорошая погода.", None),
    ],
)
def test_the_language_of_text_is_recognised(text: str, language: str | None) -> None:
    assert guess_language(text) == language


def test_the_size_of_a_source_that_is_not_read_whole_is_estimated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cpt_merge.launcher.inspection.SAMPLE", 1000)
    path = tmp_path / "lang=x" / "ko.txt"
    path.parent.mkdir()
    path.write_text("가나다라마바사아자차\n" * 5000, encoding="utf-8")
    facts = inspect_text(str(path))
    assert facts.language == "ko"
    assert facts.documents == 100
    assert facts.characters == pytest.approx(50_000, rel=0.05)
