import pytest
from matplotlib.figure import Figure

from tests.report.runs import SCORES, finish, record, start, train

HOSTILE = "<script>alert(1)</script> [/INST] 서울"


@pytest.fixture
def run(tmp_path):
    """A run whose training is not finished and whose evaluation is."""
    run = tmp_path / "runs" / "demo"
    start(run, "tokenizer").table(
        "fertility", ["language", "tokens"], [["ko", 1.25], ["zh_tw", None]]
    )
    finish(run, "tokenizer", {"new_size": 6016, "nested": {"within": 17}})
    train(run).alert("non-finite gradient", "step 30 left out")
    evaluation = start(run, "evaluation")
    figures = (("bits_per_byte", 2.1), ("chat", 0.5))
    evaluation.table(
        "eval/scores",
        SCORES,
        [[m, "ko", f, v, 0.0, 1.0, 5] for m in ("base", "merged") for f, v in figures],
    )
    columns = ["language", "prompt", "model", "reply", "stopped", "in_language", "keeps_format"]
    evaluation.table(
        "eval/samples", columns, [["ko", "수도는?", "base", HOSTILE, True, False, True]]
    )
    Figure().savefig(run / "figure.png")
    evaluation.image("eval/figure", run / "figure.png")
    finish(run, "evaluation", {"base/ko/chat": 0.5})
    return run


@pytest.fixture
def complete(run):
    """`run`, with all stages finished and no older inputs."""
    for stage in ("embeddings", "data", "merge"):
        start(run, stage)
    text = {"text ko.jsonl": "t1"}
    record(run, "tokenizer", "k1", {"base": "b1", **text})
    record(run, "embeddings", "e1", {"base": "b1", "tokenizer": "stage:k1"})
    record(run, "data", "d1", {"tokenizer": "stage:k1", **text})
    record(run, "training", "c1", {"model": "stage:e1", "data": "stage:d1"})
    record(run, "merge", "m1", {"cpt": "stage:c1", "tokenizer": "stage:k1", "base": "b1"})
    record(run, "evaluation", "v1", {"cpt": "stage:c1", "merged": "stage:m1", "base": "b1", **text})
    return run
