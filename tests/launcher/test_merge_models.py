"""`cpt-merge merge-models` and `extract-vector`, as people type them."""

import json
import sys
from pathlib import Path

import pytest

from tests.command_line import cpt_merge
from tests.merge.conftest import Family, make_family, write_config
from tests.merge.test_expert_layouts import build
from tests.processes import Processes


@pytest.fixture
def family(tmp_path: Path) -> Family:
    made = make_family(tmp_path / "models")
    made.vocabulary.save(made.cpt)
    return made


def pair(family: Family, *more: str | Path) -> list[str | Path]:
    return ["--cpt", family.cpt, "--base", family.base, "--chat", family.chat, *more]


def test_merge_and_extract_and_merge_again(family: Family, tmp_path: Path) -> None:
    out = "--out", tmp_path / "direct"
    direct = cpt_merge(
        "merge-models", *pair(family, "--ratio", "ramp(0.2, 1)", *out, "dtype=float32")
    )
    assert direct.returncode == 0, direct.stderr
    assert "cpt-merge chat" in direct.stderr
    report = json.loads((tmp_path / "direct" / "merge_report.json").read_text())
    assert report["ratio"] == "ramp(0.2, 1)"

    of_pair = "--base", family.base, "--chat", family.chat
    assert cpt_merge("extract-vector", *of_pair, "--out", tmp_path / "vector").returncode == 0
    settings = ["merge.ratio=ramp(0.2, 1)", "dtype=float32"]
    vector = "--cpt", family.cpt, "--vector", tmp_path / "vector", "--out", tmp_path / "out"
    assert cpt_merge("merge-models", *vector, *settings).returncode == 0
    weights = [(tmp_path / out / "model.safetensors").read_bytes() for out in ("direct", "out")]
    assert weights[0] == weights[1]


SETTINGS = sorted((Path(__file__).parents[2] / "recipes" / "merge").glob("*.yaml"))


@pytest.mark.parametrize("path", SETTINGS, ids=lambda path: path.stem)
def test_the_published_cases_merge(path: Path, family: Family, tmp_path: Path) -> None:
    of = ["--cpt", family.cpt, "--chat", family.chat, "--out", tmp_path / "out", "dtype=float32"]
    if "method: interpolate" not in path.read_text():
        of += ["--base", family.base]
    if path.stem == "two-vectors":
        of.append(f"vectors=[{{base: {family.base}, chat: {family.chat}, ratio: 0.4}}]")
    done = cpt_merge("merge-models", "--settings", path, *of)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert report["ratio"] == {"two-vectors": 0.8, "reasoning-on-top": 1.0}.get(path.stem, 0.5)


def test_settings_of_a_file_give_way_to_the_command_line(family: Family, tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("ratio: 0.5\nrules: [{kinds: [norm], action: skip}]\n")
    out = "--out", tmp_path / "out"
    done = cpt_merge("merge-models", *pair(family, "--settings", file, "--ratio", "0.25", *out))
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert float(report["ratio"]) == 0.25
    file.write_text("ration: 1\n")
    done = cpt_merge("merge-models", *pair(family, "--settings", file, "--out", tmp_path / "no"))
    assert done.returncode == 2
    assert "unknown key `ration`; the nearest known key is `ratio`" in done.stderr


def test_the_plan_lists_every_tensor(family: Family, tmp_path: Path) -> None:
    settings = "rules=[{kinds: [norm], action: skip}]", "ratio=0.5"
    out = "--out", tmp_path / "out"
    done = cpt_merge("merge-models", "--plan", *pair(family, *out, *settings))
    assert done.returncode == 0, done.stderr
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if line}
    assert "keep" in lines["model.norm.weight"]
    assert "+0.5 chat vector" in lines["model.layers.1.mlp.up_proj.weight"]
    assert "21 tensors in 1 file" in done.stdout
    assert "rows from the chat model itself: <|eot|> <|im_start|>" in done.stdout
    assert not (tmp_path / "out").exists()


def test_the_plan_lists_everything_that_is_refused(family: Family, tmp_path: Path) -> None:
    write_config(family.chat, 40, True, model_type="mistral")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    words = "--out", tmp_path / "out", "rules=[{pattern: q_porj, ratio: 0}]"
    done = cpt_merge("merge-models", "--plan", *pair(family, *words))
    assert done.returncode == 2
    listed = [line for line in done.stdout.splitlines() if line.startswith("  - ")]
    assert f"{len(listed)} problems prevent this merge:" in done.stdout
    for problem in ("mistral in chat", "q_porj", "is not empty"):
        assert any(problem in line for line in listed), (problem, done.stdout)


CPT, PAIR, OUT = ["--cpt", "CPT"], ["--base", "BASE", "--chat", "CHAT"], ["--out", "OUT"]
MERGE = ["merge-models", *CPT, *PAIR, *OUT]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["merge-models"], "Missing option '--cpt'"),
        (["merge-models", *CPT, *OUT], "give the pair"),
        (["merge-models", *CPT, *PAIR], "Missing option '--out'"),
        ([*MERGE, "--vector", "CHAT"], "leave out one"),
        (["merge-models", "--cpt", "none", *PAIR, *OUT], "give a directory, or a hub id"),
        ([*MERGE, "ratoi=1"], "nearest known key is `ratio`"),
        ([*MERGE, "--ratio", "a lot"], "not an arithmetic"),
        ([*MERGE, "density=0.2"], "set a density together"),
        ([*MERGE, "--ratio", "1", "ratio=2"], "leave out one"),
        ([*MERGE, "--tokenizer", "OUT"], "holds no tokenizer"),
        (["merge-models", *CPT, *PAIR, "--out", "CPT/in/it"], "are inside each other"),
        (["extract-vector", "--base", "BASE"], "Missing option '--chat'"),
        (["extract-vector", *PAIR, *OUT, "ratio=2"], "leave out ratio"),
        (["merge", "none.yaml"], "does not exist"),
    ],
)
def test_an_error_is_one_sentence(
    family: Family, tmp_path: Path, arguments: list[str], words: str
) -> None:
    names = {"BASE": family.base, "CHAT": family.chat, "OUT": tmp_path / "out"}
    given = [names.get(word, word.replace("CPT", str(family.cpt))) for word in arguments]
    done = cpt_merge(*given)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_the_command_needs_neither_torch_nor_transformers(
    family: Family, tmp_path: Path, processes: Processes
) -> None:
    code = (
        "import sys; from cpt_merge.launcher.cli import main; assert main(sys.argv[1:]) == 0\n"
        "heavy = {'torch', 'transformers', 'datasets', 'accelerate', 'wandb'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    arguments = ["merge-models", *pair(family, "--out", tmp_path / "out")]
    done = processes.run(sys.executable, "-c", code, *arguments)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("command", [["merge-models"], ["merge-models", "--plan"]])
@pytest.mark.parametrize("broken", ["cpt", "base", "chat"])
def test_a_config_with_another_number_of_experts_is_refused(
    broken: str, command: list[str], tmp_path: Path
) -> None:
    for seed, name in enumerate(("cpt", "base", "chat")):
        build(tmp_path / name, "qwen3-moe", seed)
        (tmp_path / name / "one-by-one").rename(tmp_path / name / "model")
    config = json.loads((tmp_path / broken / "model" / "config.json").read_text())
    changed = {key: 6 for key in ("num_experts", "num_local_experts") if key in config}
    (tmp_path / broken / "model" / "config.json").write_text(json.dumps({**config, **changed}))
    models = [
        word
        for name in ("cpt", "base", "chat")
        for word in (f"--{name}", tmp_path / name / "model")
    ]
    done = cpt_merge(*command, *models, "--out", tmp_path / "out")
    assert done.returncode == 2
    assert f"{broken}/model lacks model.layers.0.mlp.experts.3." in " ".join(done.stderr.split())
    assert not (tmp_path / "out").exists()
