"""`cpt-merge merge` without a recipe, as people type it."""

import json
import subprocess
import sys

import pytest

from tests.merge.conftest import Family, make_family, write_config


@pytest.fixture
def family(tmp_path):
    made = make_family(tmp_path / "models")
    made.vocabulary.save(made.cpt)
    return made


def cpt_merge(*arguments):
    command = [
        sys.executable,
        "-m",
        "cpt_merge.launcher.cli",
        *(str(argument) for argument in arguments),
    ]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def pair(family: Family, *more):
    return ["--cpt", family.cpt, "--base", family.base, "--chat", family.chat, *more]


def test_merge_and_extract_and_merge_again(family, tmp_path):
    direct = cpt_merge(
        "merge",
        *pair(family, "--ratio", "ramp(0.2, 1)", "--out", tmp_path / "direct", "dtype=float32"),
    )
    assert direct.returncode == 0, direct.stderr
    assert "cpt-merge chat" in direct.stderr
    assert (
        json.loads((tmp_path / "direct" / "merge_report.json").read_text())["ratio"]
        == "ramp(0.2, 1)"
    )
    extract = [
        "merge",
        "--extract",
        "--base",
        family.base,
        "--chat",
        family.chat,
        "--out",
        tmp_path / "vector",
    ]
    assert cpt_merge(*extract).returncode == 0
    settings = ["merge.ratio=ramp(0.2, 1)", "dtype=float32"]
    vector = [
        "--cpt",
        family.cpt,
        "--vector",
        tmp_path / "vector",
        "--out",
        tmp_path / "out",
        *settings,
    ]
    assert cpt_merge("merge", *vector).returncode == 0
    weights = [(tmp_path / out / "model.safetensors").read_bytes() for out in ("direct", "out")]
    assert weights[0] == weights[1]


def test_the_plan_lists_every_tensor(family, tmp_path):
    done = cpt_merge(
        "merge", "plan", *pair(family, "rules=[{kinds: [norm], action: skip}]", "ratio=0.5")
    )
    assert done.returncode == 0, done.stderr
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if line}
    assert "keep" in lines["model.norm.weight"]
    assert "+0.5 chat vector" in lines["model.layers.1.mlp.up_proj.weight"]
    assert "21 tensors in 1 file" in done.stdout
    assert "rows from the chat model itself: <|eot|> <|im_start|>" in done.stdout


def test_the_plan_lists_everything_that_is_refused(family, tmp_path):
    write_config(family.chat, 40, True, model_type="mistral")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    done = cpt_merge(
        "merge",
        "plan",
        *pair(family, "--out", tmp_path / "out", "rules=[{pattern: q_porj, ratio: 0}]"),
    )
    assert done.returncode == 2
    listed = [line for line in done.stdout.splitlines() if line.startswith("  - ")]
    for problem in ("mistral in chat", "tied head", "q_porj", "is not empty"):
        assert any(problem in line for line in listed), (problem, done.stdout)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give a RECIPE, or --cpt DIR"),
        (["--cpt", "CPT", "--out", "OUT"], "give the pair"),
        (["--cpt", "CPT", "--base", "BASE", "--chat", "CHAT"], "--out DIR"),
        (["--cpt", "CPT", "--base", "BASE", "--chat", "CHAT", "--vector", "CHAT", "--out", "OUT"], "leave out one"),
        (["--cpt", "none", "--base", "BASE", "--chat", "CHAT", "--out", "OUT"], "give a directory, or a hub id"),
        (["--cpt", "CPT", "--base", "BASE", "--chat", "CHAT", "--out", "OUT", "ratoi=1"], "nearest known key is `ratio`"),
        (["--cpt", "CPT", "--base", "BASE", "--chat", "CHAT", "--out", "OUT", "--ratio", "a lot"], "no arithmetic"),
        (["--cpt", "CPT", "--base", "BASE", "--chat", "CHAT", "--out", "OUT", "density=0.2"], "set a density together"),
        (["--extract", "--base", "BASE"], "--extract needs"),
        (["--extract", "--base", "BASE", "--chat", "CHAT", "--out", "OUT", "ratio=2"], "leave out ratio"),
        (["pan", "--cpt", "CPT"], "recipe pan does not exist"),
        (["none.yaml"], "does not exist"),
        (["plan", "--extract", "--base", "BASE", "--chat", "CHAT", "--out", "OUT"], "leave out plan"),
        (["--cpt", "CPT", "--base", "BASE", "--chat", "CHAT", "--out", "OUT", "--ratio", "1", "ratio=2"], "leave out one"),
        (["--cpt", "CPT", "--base", "BASE", "--chat", "CHAT", "--out", "OUT", "--tokenizer", "OUT"], "holds no tokenizer"),
        (["--cpt", "CPT", "--base", "BASE", "--chat", "CHAT", "--out", "CPT/in/it"], "lie one in the other"),
    ],
)  # fmt: skip
def test_what_is_missing_or_wrong_is_said_in_one_sentence(family, tmp_path, arguments, words):
    names = {"CPT": family.cpt, "BASE": family.base, "CHAT": family.chat, "OUT": tmp_path / "out"}
    given = [
        names.get(argument, str(argument).replace("CPT", str(family.cpt))) for argument in arguments
    ]
    done = cpt_merge("merge", *given)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_the_command_starts_without_torch_and_transformers(family, tmp_path):
    code = (
        "import sys; from launcher.cli import main; main(sys.argv[1:])\n"
        "print(sorted({'torch', 'transformers', 'datasets', 'accelerate', 'wandb'} & set(sys.modules)))"
    )
    arguments = ["merge", *pair(family, "--out", tmp_path / "out")]
    command = [sys.executable, "-c", code, *(str(argument) for argument in arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
