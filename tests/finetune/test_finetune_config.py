"""The recipe's `finetune` section, and the training that it asks for."""

from typing import Any

import pytest

from cpt_merge.core.config import parse_section
from cpt_merge.core.errors import UserError
from cpt_merge.data.store import MaskedCounts, SourceInfo
from cpt_merge.finetune import FinetuneConfig
from cpt_merge.training import TrainingConfig

TRAINING = TrainingConfig(
    tokens=1_000_000, sequence_length=4096, precision="fp32", compile=True,
    phases=[{"train": "vocabulary", "tokens": 1000}, {"train": "all"}], lora={"rank": 8},
    optimizer={"learning_rate": 2e-4, "embedding_learning_rate": 1e-3, "beta2": 0.9},
)  # fmt: skip


def config(**keys: Any) -> FinetuneConfig:
    source = {"path": "chat.jsonl", "language": "ko"}
    return parse_section(FinetuneConfig, {"sources": [source], **keys}, "here")


def info(tokens: int) -> SourceInfo:
    counts = MaskedCounts(1, tokens, 0, 9, trained=1, length=128)
    return SourceInfo("ko:chat", "ko", "00", {}, counts, counts, None)


def test_the_loop_has_the_settings_of_the_training_but_for_its_own() -> None:
    loop = config(learning_rate=1e-6, global_batch_size=4).training_config(TRAINING, 10 * 4096)
    assert (loop.precision, loop.compile, loop.optimizer.beta2) == ("fp32", True, 0.9)
    assert (loop.phases, loop.lora, loop.sequence_length) == ([], None, 4096)
    assert loop.optimizer.learning_rate == 1e-6
    assert loop.optimizer.embedding_learning_rate is None
    assert loop.steps == 3  # 10 sequences in steps of 4


def test_a_source_is_read_as_often_as_its_epochs_say() -> None:
    sources = [{"path": f"{n}.jsonl", "language": "ko"} for n in range(2)]
    asked = config(sources=[sources[0], {**sources[1], "epochs": 1}], epochs=3)
    tokens, shares = asked.reading([info(1000), info(500)])
    assert tokens == 3500
    assert [share.share for share in shares] == [3000 / 3500, 500 / 3500]
    assert [share.epochs for share in shares] == [3, 1]


def test_only_what_changes_the_weights_is_in_the_key() -> None:
    before = config().settings(TRAINING)
    for same in ({"evaluate_every": 7}, {"log_every": 3}):
        assert config(**same).settings(TRAINING) == before
    for other in ({"epochs": 1}, {"learning_rate": 1e-6}, {"lora": {"rank": 4}}):
        assert config(**other).settings(TRAINING) != before


@pytest.mark.parametrize("amount", [{"weight": 2}, {"tokens": 1000}])
def test_amounts_of_text_mean_nothing_to_conversations(amount: dict[str, int]) -> None:
    with pytest.raises(UserError, match="leave it out"):
        config(sources=[{"path": "chat.jsonl", "language": "ko", **amount}])
