"""Preference pairs: two rows with the same prompt, together in a sequence."""

from pathlib import Path
from typing import Any

import pytest

from cpt_merge.core.errors import UserError
from cpt_merge.data.conversations_inputs import check_conversations
from cpt_merge.data.conversations_rows import ChatRow
from cpt_merge.data.conversations_run import run
from cpt_merge.data.conversations_store import ChatNotes
from cpt_merge.data.packing import PackedDocuments, stack
from cpt_merge.data.pairs import Preference
from cpt_merge.data.preferences import PairSource, fitting_pair
from cpt_merge.data.preferences_messages import PairRecord, read_pair
from cpt_merge.data.readers.rows import BadRow
from cpt_merge.data.store import Store
from cpt_merge.finetune import PreferenceConfig
from cpt_merge.tracking import Tracker
from tests.data.chat_templates import CHATML, QWEN_3, of
from tests.data.test_conversations_run import LENGTH, save, write


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def shared(text: str) -> dict[str, Any]:
    return {**assistant(text), "weight": 0}


GOOD, BAD = assistant("Kim."), assistant("No.")
TOLD = {"role": "system", "content": "Be kind."}
LONG = [user("Hi."), assistant("Hi!"), user("Who?")]
HH = "\n\nHuman: Hi.\n\nAssistant: Hi!\n\nHuman: Who?\n\nAssistant: "


@pytest.mark.parametrize(
    ("record", "prompt"),
    [
        ({"prompt": "Who?", "chosen": "Kim.", "rejected": "No."}, [user("Who?")]),
        ({"question": "Who?", "system": "Be kind.", "chosen": "Kim.", "rejected": "No."}, [TOLD, user("Who?")]),
        ({"instruction": "Who?", "chosen_response": "Kim.", "rejected_response": "No."}, [user("Who?")]),
        ({"prompt": [TOLD, user("Who?")], "chosen": [GOOD], "rejected": [BAD]}, [TOLD, user("Who?")]),
        ({"prompt": "Who?", "chosen": [user("Who?"), GOOD], "rejected": [user("Who?"), BAD], "messages": [user("Who?"), GOOD]}, [user("Who?")]),
        ({"chosen": [*LONG, GOOD], "rejected": [*LONG, BAD]}, [LONG[0], shared("Hi!"), LONG[2]]),
        ({"chosen": HH + "Kim.", "rejected": HH + "No."}, [LONG[0], shared("Hi!"), LONG[2]]),
        ({"conversations": [{"from": "human", "value": "Who?"}], "chosen": {"from": "gpt", "value": "Kim."}, "rejected": {"from": "gpt", "value": "No."}}, [user("Who?")]),
    ],
)  # fmt: skip
def test_published_formats_are_read(record: dict[str, Any], prompt: list[Any]) -> None:
    found = read_pair(record)
    assert isinstance(found, PairRecord)
    assert found.chosen.messages == [*prompt, {**GOOD, "weight": 1}]
    assert found.rejected.messages == [*prompt, {**BAD, "weight": 1}]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"prompt": "Who?", "chosen": "Kim."}, "it has no field 'rejected' but prompt, chosen"),
        ({"chosen": "Kim.", "rejected": "No."}, "is a reply alone, and the record has no 'prompt'"),
        ({"prompt": "?", "chosen": "No.", "rejected": "No."}, "has the same reply as 'chosen' and"),
        (
            {"chosen": [user("Who?"), GOOD], "rejected": [user("How?"), BAD]},
            "has prompts of 'chosen' and 'rejected' that differ",
        ),
        ({"chosen": LONG, "rejected": LONG}, "does not end with a reply of the assistant"),
        ({"prompt": 3, "chosen": "Kim.", "rejected": "No."}, "follows a 'prompt' that"),
        (
            {"prompt": "?", "chosen": [3], "rejected": "No."},
            "has a field 'chosen' that has a field",
        ),
    ],
)
def test_what_is_no_pair_is_said(record: dict[str, Any], reason: str) -> None:
    found = read_pair(record)
    assert isinstance(found, BadRow)
    assert reason in found.reason


@pytest.mark.parametrize(
    ("sizes", "kept"),
    [
        ((8, 8), (8, 8)),
        ((12, 4), (12, 4)),
        ((14, 4), (12, 4)),
        ((4, 14), (4, 12)),
        ((20, 9), (8, 8)),
    ],
)
def test_both_rows_fit_a_sequence(sizes: tuple[int, int], kept: tuple[int, int]) -> None:
    rows = [ChatRow(list(range(size)), [False] * 3 + [True] * (size - 3), 1) for size in sizes]
    notes = ChatNotes()
    assert tuple(len(row.ids) for row in fitting_pair("here", rows, 16, notes)) == kept
    assert notes.cut == sum(size != most for size, most in zip(sizes, kept, strict=True))
    assert fitting_pair("here", rows, 6, notes) == []
    assert notes.too_long == 2


def pair(number: int) -> dict[str, Any]:
    return {
        "prompt": f"Who is {number}?",
        "chosen": f"Good {number}." * (1 + number % 5),
        "rejected": f"Bad {number}." * (1 + number % 3),
    }


def test_both_rows_of_a_pair_come_together(tmp_path: Path) -> None:
    tokenizer = save(tmp_path / "tokenizer", CHATML)
    source = write(tmp_path / "a.jsonl", [*map(pair, range(200))])
    config = PreferenceConfig(sources=[source], heldout=0.2)
    check_conversations(config, LENGTH, tokenizer)
    run(config, LENGTH, tokenizer, tmp_path / "store", Tracker())
    store, seen = Store.open(tmp_path / "store"), list[str]()
    decode = of(CHATML, "<|im_end|>").tokenizer.decode
    for split in ("train", "heldout"):
        documents = store.documents(store.info.sources[0], split)  # type: ignore[arg-type]
        packed = PackedDocuments(documents, LENGTH, Preference(0.1, tmp_path))
        for number in range(packed.sequences):
            batch = stack([(packed, number)], with_reference=False)
            assert batch.pairs
            reply, labels = batch.pairs.reply, batch.labels.flatten()
            for first in range(0, 2 * batch.pairs.count, 2):
                good, bad = (decode(labels[reply == place]) for place in (first, first + 1))
                assert good.startswith("Good")
                assert good.endswith(".<|im_end|>")
                assert bad.startswith(good.partition(".")[0].replace("Good", "Bad") + ".")
                seen.append(good)
    assert len(set(seen)) == len(seen) == 200


def test_rows_with_different_prompts_are_no_pair(tmp_path: Path) -> None:
    """This template asks for a reply without a thought otherwise than for one with a thought."""
    tokenizer = save(tmp_path / "tokenizer", QWEN_3)
    chosen = {**GOOD, "reasoning_content": "Hm."}
    record = {"prompt": [user("Who?")], "chosen": [chosen], "rejected": [BAD]}
    source = write(tmp_path / "a.jsonl", [record])
    with pytest.raises(
        UserError, match=r"line 1 has a 'chosen' and a 'rejected' for which the chat"
    ):
        check_conversations(PreferenceConfig(sources=[source]), LENGTH, tokenizer)


def test_pairs_have_no_format_key() -> None:
    with pytest.raises(ValueError, match="has pairs and 'format'; leave it out"):
        PairSource(path="a.jsonl", language="ko", format="alpaca")
