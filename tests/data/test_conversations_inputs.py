"""What would stop the fine-tuning is found in the first conversations."""

import json
from pathlib import Path
from typing import Any

import pytest

from cpt_merge.core.errors import UserError
from cpt_merge.data.conversations_config import ConversationsConfig
from cpt_merge.data.conversations_inputs import HEAD_RECORDS, OTHER_RECORDS, check_conversations
from tests.data.chat_templates import CHATML, ENDLESS, GEMMA, LLAMA_2, QWEN_3, of

ASKED = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}]


def saved(directory: Path, template: str | None, end: str = "<|im_end|>") -> Path:
    made = of(template or CHATML, end)
    if template is None:
        made.tokenizer.chat_template = None
    made.tokenizer.save_pretrained(directory)
    settings = {"eos_token_id": sorted(made.end_ids)}
    (directory / "generation_config.json").write_text(json.dumps(settings))
    return directory


def write(path: Path, *records: object) -> dict[str, Any]:
    path.write_text("".join(json.dumps(one) + "\n" for one in records))
    return {"path": str(path), "language": "ko"}


def check(folder: Path, chat: Path, *records: object, length: int = 256, **keys: Any) -> None:
    source = write(folder / "a.jsonl", *records) | keys.pop("source", {})
    check_conversations(ConversationsConfig(sources=[source], **keys), length, chat)


def test_good_conversations_pass_in_silence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check(tmp_path, saved(tmp_path / "chat", CHATML), {"messages": ASKED})
    assert capsys.readouterr().err == ""


LONG = [ASKED[0] | {"content": "Who? " * 99}, ASKED[1]]


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        (ASKED[:1], "a.jsonl: line 2 has no message of an assistant to train on; fix it, or"),
        ([ASKED[0], {"role": "assistant", "content": " "}], "has an empty message 2 of the assist"),
        ([{"role": "critic", "content": "?"}, *ASKED], "a message 1 with the role 'critic', which"),
        ([], "line 2 has a field 'messages' without messages"),
        ([{"role": "user"}], "line 2 has a message 1 without content"),
    ],
)
def test_a_bad_record_is_named(messages: Any, reason: str, tmp_path: Path) -> None:
    chat = saved(tmp_path / "chat", CHATML)
    with pytest.raises(UserError) as caught:
        check(tmp_path, chat, {"messages": ASKED}, {"messages": messages})
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("template", "end", "reason"),
    [
        (None, "<|im_end|>", "has no chat template, so conversations cannot be rendered"),
        (ENDLESS, "<|im_end|>", "ends without any of the tokens that end a reply"),
        (
            "{{ messages[0].content }}",
            "<|im_end|>",
            "a message 2 whose content the chat template leaves out",
        ),
        ("{% if %}", "<|im_end|>", "is refused by the chat template"),
    ],
)
def test_a_template_that_cannot_be_trained_with_is_refused(
    template: str | None, end: str, reason: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        check(tmp_path, saved(tmp_path / "chat", template, end), {"messages": ASKED})
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_a_template_refuses_is_refused(tmp_path: Path) -> None:
    system = {"messages": [{"role": "system", "content": "Be kind."}, *ASKED]}
    with pytest.raises(UserError, match=r"refused by the chat template \(no system role\)"):
        check(tmp_path, saved(tmp_path / "chat", GEMMA, "<end_of_turn>"), system)
    twice = {"messages": [ASKED[0], *ASKED]}
    with pytest.raises(UserError, match="roles must take turns"):
        check(tmp_path, saved(tmp_path / "chat", LLAMA_2, "</s>"), twice)


def test_lengths_are_looked_at(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chat = saved(tmp_path / "chat", CHATML)
    wordy = [ASKED[0], {"role": "assistant", "content": "Me. " * 99}]
    check(tmp_path, chat, {"messages": ASKED}, {"messages": wordy}, {"messages": LONG}, length=64)
    told = capsys.readouterr().err
    assert "of the first 3 records of" in told
    assert "1 row cut at the end of the sequence, the first at" in told
    assert "1 row left out: no reply begins within a sequence" in told
    with pytest.raises(
        UserError, match=r"begins within a sequence of 64 tokens; raise finetune.se"
    ):
        check(tmp_path, chat, {"messages": LONG}, length=64)


def test_a_source_without_good_records_is_refused_though_it_may_skip(tmp_path: Path) -> None:
    chat, skip = saved(tmp_path / "chat", CHATML), {"bad_rows": "skip"}
    with pytest.raises(
        UserError, match=r"none of the first 2 records .*line 1, which is no conver"
    ):
        check(tmp_path, chat, {"text": "?"}, {"text": "!"}, source=skip)
    check(tmp_path, chat, {"text": "?"}, {"messages": ASKED}, source=skip)


def test_missing_and_empty_files_are_refused(tmp_path: Path) -> None:
    chat = saved(tmp_path / "chat", CHATML)
    with pytest.raises(UserError, match="does not exist; correct its path"):
        check(tmp_path, chat, source={"path": str(tmp_path / "b.jsonl")})
    with pytest.raises(UserError, match="has no conversations in its split 'train'"):
        check(tmp_path, chat)
    with pytest.raises(UserError, match=r"no conversations in its split 'train\[5:\]'"):
        check(tmp_path, chat, {"messages": ASKED}, source={"split": "train[5:]"})


def test_files_are_looked_at_where_they_begin(tmp_path: Path) -> None:
    chat, folder = saved(tmp_path / "chat", CHATML), tmp_path / "many"
    folder.mkdir()
    good = [{"messages": ASKED}]
    write(folder / "1.jsonl", *(good * HEAD_RECORDS), {"text": "?"})
    write(folder / "2.jsonl", *(good * OTHER_RECORDS), {"text": "?"})
    check(tmp_path, chat, *good, source={"path": str(folder)})
    write(folder / "2.jsonl", {"text": "?"})
    with pytest.raises(UserError, match=r"2.jsonl: line 1 is no conversation"):
        check(tmp_path, chat, *good, source={"path": str(folder)})


def test_variables_that_the_template_ignores_are_refused(tmp_path: Path) -> None:
    chat = saved(tmp_path / "chat", QWEN_3)
    check(tmp_path, chat, {"messages": ASKED}, chat_template_kwargs={"enable_thinking": True})
    for name in ("enable_thoughts", "messages", "add_generation_prompt", "tokenize"):
        with pytest.raises(
            UserError, match=rf"has '{name}', but .* reads enable_thinking; correct"
        ):
            check(tmp_path, chat, {"messages": ASKED}, chat_template_kwargs={name: True})
