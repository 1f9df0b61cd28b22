"""`import cpt_merge`: the example of docs/api.md, and what the import costs."""

import json
import re
import sys
from pathlib import Path

import pytest

import cpt_merge
from tests.launcher.conftest import sentences
from tests.processes import ROOT, Processes


def test_the_example_of_the_documentation(
    pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("base", "chat"):
        Path(name).symlink_to(pair / name)
    rows = [json.dumps({"text": text}, ensure_ascii=False) for text in sentences("ko", 60)]
    Path("ko.jsonl").write_text("\n".join(rows), encoding="utf-8")
    code = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "api.md").read_text("utf-8"), re.S)
    names: dict[str, object] = {}
    exec("".join(code), names)
    assert float(capsys.readouterr().out.splitlines()[-1]) > 0
    assert Path("merged/model.safetensors").is_file()


def test_every_name_exists_and_is_documented() -> None:
    for name in cpt_merge.__all__:
        assert getattr(cpt_merge, name).__doc__, name
    assert set(cpt_merge.__all__) <= set(dir(cpt_merge))
    assert not hasattr(cpt_merge, "no_such_name")


def test_the_import_is_light(processes: Processes) -> None:
    code = (
        "import sys, cpt_merge; from cpt_merge import load_recipe, merge_models\n"
        "print({'torch', 'transformers', 'datasets', 'wandb'} & set(sys.modules) or 'light')"
    )
    done = processes.run(sys.executable, "-c", code)
    assert done.stdout.strip() == "light", done.stderr


def test_a_stage_and_its_results(
    finished: Path, recipe_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cpt_merge.load_recipe(recipe_path, ["name=other"]).name == "other"
    results = cpt_merge.run_stage(recipe_path, "tokenizer")  # which is finished
    assert results == json.loads((finished / "tokenizer" / "stage.json").read_text())["results"]
