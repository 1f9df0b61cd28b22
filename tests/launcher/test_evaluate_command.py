"""`cpt-merge evaluate` without a recipe: its words, what is wrong with them, and a whole evaluation of directories."""

import json
from pathlib import Path

import pytest

from cpt_merge.core.errors import UserError
from cpt_merge.launcher.cli import app
from cpt_merge.launcher.evaluate import Request, evaluate, one_value_each


def test_an_option_takes_all_the_pairs_behind_it() -> None:
    words = "--models a=A b=B --suite chat --text ko=F en=G evaluation.seed=1 --out O".split()
    assert one_value_each(words) == (
        "--models a=A --models b=B --suite chat --text ko=F --text en=G evaluation.seed=1 --out O".split()
    )
    assert (
        one_value_each("recipe.yaml merge.ratio=1 a=b".split())
        == "recipe.yaml merge.ratio=1 a=b".split()
    )
    words = "--models qwen2.5=A llama.3=B evaluation.seed=1 tracking.mode=disabled".split()
    assert (
        one_value_each(words)
        == "--models qwen2.5=A --models llama.3=B evaluation.seed=1 tracking.mode=disabled".split()
    )
    assert (
        one_value_each("--models a=A.b/c b=./B".split())
        == "--models a=A.b/c --models b=./B".split()
    )


OUT = Path("out")
BAD = [
    (Request([]), "give a RECIPE, or --models NAME=DIR"),
    (Request([], ["a=A"]), "and --out DIR"),
    (Request(["r.yaml"], ["a=A"], "chat"), "--models, --suite and a recipe say the same"),
    (Request([], ["A"], out=OUT), "--models A is not of the form NAME=VALUE"),
    (Request([], ["a=A", "a=B"], out=OUT), "--models names a twice"),
    (Request([], ["a=./nowhere"], out=OUT), "model ./nowhere does not exist"),
    (Request([], ["a=A"], "chat,talk", out=OUT), "`evaluation.suites.1` = 'talk'"),
    (
        Request(["evaluation.suites=[chat]"], ["a=A"], "chat", out=OUT),
        "--suite and evaluation.suites say the same",
    ),
    (
        Request(["evaluation.max_token=1"], ["a=A"], out=OUT),
        "the nearest known key is `evaluation.max_",
    ),
    (Request(["merge.ratio=1"], ["a=A"], out=OUT), "unknown key `merge`"),
    (
        Request(["evaluation.safety.moderation={url: host, model: m}"], ["a=A"], out=OUT),
        "safety.moderation.url",
    ),
    (
        Request(
            ["evaluation.judge={url: 'http://h/v1', model: m, prompts: {mark: Well}}"],
            ["a=A"],
            out=OUT,
        ),
        "{conversation} is missing; put it where the replies belong",
    ),
    (
        Request(["evaluation.knowledge.tasks={kmmlu: kr}"], ["a=A"], out=OUT),
        "language 'kr' is not known",
    ),
    (Request(["evaluation.seed=-1"], ["a=A"], out=OUT), "`evaluation.seed`"),
    (Request(["evaluation.models.b=B"], ["a=A"], out=OUT), "evaluation.models is for a recipe"),
    (Request(["evaluation.languages=[kr]"], ["a=A"], out=OUT), "language 'kr' is not known"),
]


@pytest.mark.parametrize(("request_", "sentence"), BAD)
def test_bad_words(request_: Request, sentence: str) -> None:
    with pytest.raises(UserError) as raised:
        evaluate(request_)
    assert sentence in str(raised.value)


def test_bad_places(pair: Path, tmp_path: Path) -> None:
    models, file = [f"a={pair / 'chat'}"], tmp_path / "file"
    file.write_text("")
    for request, sentence in (
        (Request([], models, "form", out=file), f"--out {file} cannot be written (File exists)"),
        (
            Request([], models, "language", ["ko=no.txt"], out=tmp_path / "o"),
            "--text ko=no.txt does not exist",
        ),
        (Request([], models, out=tmp_path / "o"), "nothing is measured"),
    ):
        with pytest.raises(UserError) as raised:
            evaluate(request)
        assert sentence in str(raised.value)


def test_directories_without_a_recipe(
    pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "ko.txt"
    text.write_text("가나 다라\n\n마바 사아\n", encoding="utf-8")
    words = [
        "evaluate", "--models", f"base={pair / 'base'}", f"chat={pair / 'chat'}", "--suite", "language,chat",
        "--text", f"ko={text}", "--out", str(tmp_path / "out"), "evaluation.max_new_tokens=4",
        "evaluation.max_prompts=2", "evaluation.baseline=chat",
    ]  # fmt: skip
    app(args=words, standalone_mode=False)
    assert (
        f"base: has no chat template; it is prompted in that of {pair / 'chat'}"
        in capsys.readouterr().err
    )
    results = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    base = results["models"]["base"]
    assert results["baseline"] == "chat"
    assert list(base["scores"]) == ["ko"], "built-in prompts are asked in the languages of the text"
    assert base["text"]["ko"]["documents"] == 2
    assert base["scores"]["ko"]["instructions"]["n"] == base["scores"]["ko"]["dialogues"]["n"] == 2
    assert base["differences"]["ko"]["bits_per_byte"]["n"] == 2
    assert (tmp_path / "out" / "log" / "tables" / "eval" / "differences.json").is_file()
