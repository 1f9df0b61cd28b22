"""`cpt-merge init`: what it finds, what it chooses, what it writes, and what it refuses."""

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from cpt_merge.core.errors import UserError
from cpt_merge.launcher import choosing
from cpt_merge.launcher.cli import main
from cpt_merge.launcher.init import (
    Asked,
    TextFacts,
    check_pair,
    gpus_here,
    inspect_text,
    write_recipe,
)
from cpt_merge.launcher.recipe import load_recipe
from cpt_merge.tokenizer_ext.base_tokenizer import read_base
from tests.command_line import cpt_merge

ROOT = Path(__file__).parents[2]


def asked(pair: Path, texts: Path, out: Path, *languages: str, **more: object) -> Asked:
    text = [(tag, str(texts / f"{tag}.jsonl")) for tag in languages]
    return Asked(str(pair / "base"), str(pair / "chat"), text, out, **more)  # type: ignore[arg-type]


def test_a_recipe_with_a_reason_for_each_choice(
    pair: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "mine.yaml"
    write_recipe(asked(pair, texts, out, "ko", "en"))
    written, recipe = out.read_text(encoding="utf-8"), load_recipe(out, [])
    assert recipe.name == "mine"
    assert 0 < recipe.tokenizer.new_pieces["ko"] <= choosing.NEW_PIECES["ko"]
    assert [(one.language, one.weight) for one in recipe.corpus.sources] == [
        ("ko", 0.85), ("en", 0.15)
    ]  # fmt: skip
    rates = choosing.of_size(0)
    assert recipe.training.optimizer.learning_rate == rates.learning_rate
    assert recipe.training.optimizer.embedding_learning_rate == rates.vocabulary_learning_rate
    assert recipe.training.sequence_length == 256, "the base has no more positions"
    assert (recipe.training.precision, recipe.training.schedule.shape) == ("fp32", "wsd")
    for reason in ("Replay of English", "tokens per character", "No GPU was named", "Breeze"):
        assert reason in written
    assert "WARNING" not in written
    assert "tokens per character; new pieces: " in " ".join(capsys.readouterr().err.split())


def test_without_english_it_warns(
    pair: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "mine.yaml"
    write_recipe(asked(pair, texts, out, "ko"))
    assert "# WARNING: there is no English text." in out.read_text()
    assert "no English text is given, so the model will forget" in capsys.readouterr().err


def test_for_named_gpus_it_writes_what_makes_the_run_fit(
    pair: Path, texts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "mine.yaml"
    small = {"gpu": "memory=2.0013,tflops=100,bandwidth=900", "gpus": 2}
    write_recipe(asked(pair, texts, out, "ko", "en", **small))
    training = load_recipe(out, []).training
    assert training.precision in ("bf16", "pure-bf16")
    assert training.global_batch_size % 2 == 0
    assert "So that it fits the memory of" in out.read_text()


@pytest.mark.parametrize(
    ("overrides", "precision", "rate"),
    [
        ({"precision": "pure-bf16", "lora.rank": "64"}, "pure-bf16", choosing.LORA_RATE),
        ({"offload": "all"}, "bf16", choosing.of_size(0).learning_rate),
    ],
)
def test_what_makes_the_run_fit_replaces_what_was_chosen(
    pair: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    overrides: dict[str, str], precision: str, rate: float,
) -> None:  # fmt: skip
    """A key that occurs twice, or offloading without FSDP2, would not pass the plan."""
    out = tmp_path / "mine.yaml"
    monkeypatch.setattr("cpt_merge.launcher.init._fitting", lambda *_: overrides)
    write_recipe(asked(pair, texts, out, "ko", "en", gpu="rtx4090"))
    recipe = load_recipe(out, [])
    assert recipe.training.precision == precision
    assert recipe.training.optimizer.learning_rate == rate
    assert recipe.launch.accelerate_config == "fsdp2"


def test_text_in_the_other_chinese_script_is_refused(pair: Path, tmp_path: Path) -> None:
    path = tmp_path / "zh.txt"
    path.write_text("這個問題很簡單，我們來說說看吧。\n" * 50, encoding="utf-8")
    base = read_base(pair / "base")
    with pytest.raises(UserError, match=r"other Chinese script .* \(probably zh_tw\)"):
        inspect_text("zh_cn", [str(path)], base)


def test_a_chat_model_that_does_not_belong_to_the_base_is_found_before_anything_is_written(
    pair: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, stranger = tmp_path / "new.yaml", tmp_path / "stranger"
    shutil.copytree(pair / "chat", stranger)
    weights = load_file(stranger / "model.safetensors")
    torch.manual_seed(1)
    noise = {name: torch.randn_like(one) for name, one in weights.items()}
    save_file(noise, stranger / "model.safetensors", metadata={"format": "pt"})
    check_pair(str(pair / "base"), str(stranger))
    assert "probably not chat's ancestor" in " ".join(capsys.readouterr().err.split())
    noise.popitem()
    save_file(noise, stranger / "model.safetensors", metadata={"format": "pt"})
    text = [("ko", str(texts / "ko.jsonl"))]
    with pytest.raises(UserError, match="do not fit together"):
        write_recipe(Asked(str(pair / "base"), str(stranger), text, out))
    assert not out.exists()


def test_pieces_that_save_little_are_left_out() -> None:
    curve = [(0, 2.0), (1000, 0.6), (2000, 0.502), (3000, 0.5)]
    found = TextFacts("ko", ["x"], 1e6, 2.0, curve)
    assert (found.pieces, found.after) == (2000, 0.5)
    assert TextFacts("ko", ["x"], 1e6, 0.7).pieces == 0, "the base's tokenizer is good enough"


@pytest.mark.parametrize(
    ("text", "tokens"), [(1e8, 4e8), (1e9, 2e9), (3e9, 3e9), (1e12, choosing.MOST)]
)
def test_little_text_is_read_again_and_much_is_capped(text: float, tokens: float) -> None:
    assert choosing.budget(text) == tokens


@pytest.mark.parametrize(
    ("tokens", "step"), [(10**6, 2**13), (10**9, 2**19), (10**10, 2**22), (10**12, 2**22)]
)
def test_a_step_leaves_a_thousand_of_them(tokens: int, step: int) -> None:
    assert choosing.step_tokens(tokens) == pytest.approx(step, rel=1.01)


def test_the_document_has_the_tables_of_the_code() -> None:
    assert choosing.tables() in (ROOT / "docs" / "choosing.md").read_text(encoding="utf-8")


def test_what_is_refused_before_anything_is_written(
    pair: Path, texts: Path, tmp_path: Path
) -> None:
    there = tmp_path / "there.yaml"
    there.touch()
    new = tmp_path / "new.yaml"
    wrong = Asked(str(pair / "base"), str(pair / "chat"), [("ko", str(texts / "en.jsonl"))], new)
    absent = Asked(str(pair / "base"), str(pair / "chat"), [("ko", str(texts / "no.jsonl"))], new)
    for one, sentence in (
        (asked(pair, texts, there, "ko"), "exists; give another name"),
        (asked(pair, texts, tmp_path / "new.txt", "ko"), "end it in .yaml"),
        (asked(pair, texts, new, "en"), "all text is English"),
        (asked(pair / "no", texts, new, "ko"), "does not exist"),
        (wrong, "only 0% of the letters are in the script of Korean"),
        (absent, "does not exist"),
        (asked(pair, texts, new, "ko", gpu="h1000"), "the GPU 'h1000' is not known"),
    ):
        with pytest.raises(UserError, match=sentence):
            write_recipe(one)
    assert not new.exists()


def test_on_no_terminal_it_asks_nothing(tmp_path: Path) -> None:
    done = cpt_merge("init", tmp_path / "a.yaml")
    assert done.returncode == 2
    assert "--base is missing, and there is no terminal to ask on" in done.stderr


def test_a_file_that_exists_is_refused_before_anything_is_asked(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("mine", encoding="utf-8")
    done = cpt_merge("init", tmp_path / "a.yaml")
    assert done.returncode == 2
    assert "exists; give another name" in " ".join(done.stderr.split())
    assert (tmp_path / "a.yaml").read_text(encoding="utf-8") == "mine"


def test_words_of_text(pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["init", str(tmp_path / "a.yaml"), "--base", str(pair / "base"), "--chat", "x"]
    assert main([*arguments, "--text", "ko.jsonl"]) == 2
    assert "--text ko.jsonl is not of the form TAG=PATH" in " ".join(
        capsys.readouterr().err.split()
    )


@pytest.mark.slow
def test_a_terminal_is_asked_for_what_is_missing(pair: Path, texts: Path, tmp_path: Path) -> None:
    """A real terminal, on which a person types."""
    import pty
    import subprocess
    import sys

    out, (ours, theirs) = tmp_path / "asked.yaml", pty.openpty()
    words = [sys.executable, "-m", "cpt_merge", "init", str(out), "--base", str(pair / "base")]
    process = subprocess.Popen(words, stdin=theirs, stdout=theirs, stderr=theirs, cwd=ROOT)
    os.close(theirs)
    wrong = [texts, f"ko={texts / 'en.jsonl'}", f"kr={texts / 'ko.jsonl'}", "h1000"]
    answers = [wrong[0], pair / "chat", *wrong[1:3], f"ko={texts / 'ko.jsonl'}"]
    answers += [f"en={texts / 'en.jsonl'}", "", wrong[3], "none"]
    os.write(ours, "".join(f"{answer}\n" for answer in answers).encode())
    said = b""
    while process.poll() is None or said.count(b"next: ") == 0:
        try:
            said += os.read(ours, 4096)
        except OSError:  # the other end is closed
            break
    os.close(ours)
    assert process.wait() == 0, said.decode(errors="replace")
    assert said.count(b"Error: ") == len(wrong)
    assert load_recipe(out, []).corpus.languages() == ["ko", "en"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine without a GPU")
def test_a_login_node_without_gpus_is_told_to_name_those_of_its_nodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sbatch").write_text("#!/bin/sh\n")
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpus_here() is None
    assert "name its GPUs by --gpu" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("device", "gigabytes", "name"),
    [
        ("NVIDIA GeForce RTX 4090", 25.3, "rtx4090"), ("NVIDIA A100-SXM4-40GB", 42.3, "a100-40gb"),
        ("NVIDIA H100 80GB HBM3", 85, "h100"), ("NVIDIA L40S", 48, "l40s"), ("NVIDIA L4", 24, "l4"),
        ("NVIDIA Unheard", 24, None),
    ],
)  # fmt: skip
def test_gpus_of_this_machine_are_named_as_in_plan(
    monkeypatch: pytest.MonkeyPatch, device: str, gigabytes: float, name: str | None
) -> None:
    about = SimpleNamespace(name=device, total_memory=gigabytes * 1e9)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda number: about)
    assert gpus_here() == (name and (name, 2))


def test_a_long_text_is_estimated_from_its_start(
    pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "ko.txt"
    path.write_text("가나다라 마바사아\n" * 4000, encoding="utf-8")
    monkeypatch.setattr("cpt_merge.launcher.init.SAMPLE", 9000)
    found = inspect_text("ko", [str(path)], read_base(pair / "base"))
    assert found.characters == pytest.approx(4000 * 9, rel=0.15)


@pytest.mark.slow
def test_the_written_recipe_makes_a_chat_model(pair: Path, texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "small.yaml"
    write_recipe(asked(pair, texts, out, "ko", "en"))
    short = ["training.tokens=32768", "training.phases=[]", f"runs={tmp_path}"]
    done = cpt_merge("run", out, *short, "evaluation.max_new_tokens=4", "evaluation.max_prompts=2")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "small" / "merge" / "chat" / "config.json").is_file()
