"""Messages name amounts with a proper plural."""

from cpt_merge.core.progress import counted


def test_a_number_and_its_noun() -> None:
    counts = [(0, "prompt"), (1, "prompt"), (1200, "prompt"), (1, "process"), (2, "process")]
    assert [counted(*one) for one in counts] == [
        "0 prompts", "1 prompt", "1,200 prompts", "1 process", "2 processes",
    ]  # fmt: skip
