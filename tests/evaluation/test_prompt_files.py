"""Prompts from files: an error names file, line and field."""

import json

import pytest

from cpt_merge.core.errors import UserError
from cpt_merge.evaluation.prompt_files import (
    parse_dialogue,
    parse_instruction,
    parse_prompt,
    parse_question,
    read_conversations,
)


def read(path, parse=parse_prompt, languages=(), limit=50, built_in=""):
    return read_conversations(str(path), "evaluation.prompts", parse, languages, limit, built_in)


USER = {"role": "user", "content": "hi"}
BAD_PROMPTS = [
    ({"messages": [USER]}, 'line 1: a prompt needs the fields "language" and "messages"'),
    ([], "a prompt needs the fields"),
    ({"language": "xx", "messages": [USER]}, "language 'xx' is not known"),
    ({"language": "ko", "messages": "hi"}, 'each of "messages"'),
    ({"language": "ko", "messages": [{"role": "robot", "content": "hi"}]}, 'each of "messages"'),
    (
        {"language": "ko", "messages": [USER, {"role": "assistant", "content": "hi"}]},
        "the last message is not the user's",
    ),
]


@pytest.mark.parametrize(("row", "sentence"), BAD_PROMPTS)
def test_bad_prompts(tmp_path, row, sentence):
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(UserError, match=sentence):
        read(path)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "does not exist"),
        (b'\n{"a": oops}', r"jsonl, line 2 is not JSON \(Expecting value: character 7\); write"),
        (b"\xff\xfe", "not UTF-8"),
        (b"\n", "no prompts"),
        (b"[" * 100_000, "is not JSON"),
        (b'{"a": "\\ud83d"}', "line 1 contains a lone surrogate"),
    ],
)
def test_bad_prompts_file(tmp_path, content, sentence):
    path = tmp_path / "prompts.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        read(path)


INSTRUCTION = {
    "language": "ko",
    "messages": [USER],
    "checks": [{"name": "sentences", "exactly": 2}],
}
BAD_INSTRUCTIONS = [
    ({"language": "ko", "messages": [USER]}, 'line 2: an instruction needs the fields .*; checks is missing'),
    ({**INSTRUCTION, "checks": []}, 'line 2: "checks" is empty'),
    ({**INSTRUCTION, "checks": {}}, 'line 2: "checks" is a list'),
    ({**INSTRUCTION, "checks": ["sentences"]}, 'each of "checks" is .*, not sentences'),
    ({**INSTRUCTION, "checks": [{"name": "sentence"}]}, "there is no check 'sentence' .*; there are avoids, bullets, .*sentences"),
    ({**INSTRUCTION, "checks": [{"name": "sentences"}]}, "check 'sentences': it needs at_least, at_most, both"),
    ({**INSTRUCTION, "checks": [{"name": "sentences", "exactly": "2"}]}, "exactly: .*integer; it takes .at_least., .at_most., .exactly."),
    ({**INSTRUCTION, "checks": [{"name": "sentences", "exactly": 2, "at_least": 1}]}, "or exactly"),
    ({**INSTRUCTION, "checks": [{"name": "sentences", "at_least": 3, "at_most": 2}]}, "admit no number"),
    ({**INSTRUCTION, "checks": [{"name": "contains", "word": ["a"]}]}, "check 'contains', word.*it takes words|words: field required"),
    ({**INSTRUCTION, "checks": [{"name": "contains", "words": []}]}, "is empty or holds an empty word"),
    ({**INSTRUCTION, "checks": [{"name": "matches", "pattern": "("}]}, "is no regular expression"),
    ({**INSTRUCTION, "checks": [{"name": "language", "language": "kr"}]}, "language 'kr' is not known"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "sentence"), BAD_INSTRUCTIONS)
def test_bad_instructions(tmp_path, row, sentence):
    path = tmp_path / "instructions.jsonl"
    path.write_text(json.dumps(INSTRUCTION) + "\n" + json.dumps(row))
    with pytest.raises(UserError, match=sentence) as raised:
        read(path, parse_instruction)
    assert str(path) in str(raised.value)


TURN = {"user": "hi", "checks": [{"name": "contains", "words": ["a"]}]}
BAD_DIALOGUES = [
    ({"language": "ko"}, "turns is missing"),
    ({"language": "ko", "turns": [TURN]}, "2 to 5 turns"),
    ({"language": "ko", "turns": [TURN] * 6}, "2 to 5 turns"),
    ({"language": "ko", "turns": [TURN, {"checks": []}]}, 'line 1, turn 2: the field "user"'),
    ({"language": "ko", "turns": [{"user": "hi"}] * 2}, "no turn has"),
    (
        {"language": "ko", "turns": [TURN, {**TURN, "checks": [{"name": "x"}]}]},
        "turn 2: there is no check 'x'",
    ),
    (
        {"language": "ko", "messages": [USER], "turns": [TURN] * 2},
        "the last one must not be the user's",
    ),
]


@pytest.mark.parametrize(("row", "sentence"), BAD_DIALOGUES)
def test_bad_dialogues(tmp_path, row, sentence):
    path = tmp_path / "dialogues.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(UserError, match=sentence):
        read(path, parse_dialogue)


def test_a_byte_order_mark_and_windows_line_ends_are_not_text(tmp_path):
    row = json.dumps(
        {"language": "ko", "messages": [{"role": "user", "content": "안녕"}]}, ensure_ascii=False
    )
    (tmp_path / "p.jsonl").write_bytes(f"\ufeff{row}\r\n{row}\r\n".encode())
    assert (
        len(
            read_conversations(str(tmp_path / "p.jsonl"), "evaluation.prompts", parse_prompt, [], 9)
        )
        == 2
    )


def test_the_first_of_each_language_and_only_those_asked_for(tmp_path):
    path = tmp_path / "prompts.jsonl"
    rows = [
        {"language": language, "messages": [USER]} for language in ("ko", "en", "ko", "ko", "zh_tw")
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    assert [one.language for one in read(path, limit=2)] == ["ko", "en", "ko", "zh_tw"]
    assert [one.language for one in read(path, languages=["en", "ko"], limit=1)] == ["ko", "en"]
    with pytest.raises(UserError, match="holds no prompt in ja"):
        read(path, languages=["ja"])


def test_a_system_message_comes_before_a_dialogues_first_turn(tmp_path):
    path = tmp_path / "dialogues.jsonl"
    system = {"role": "system", "content": "be brief"}
    path.write_text(
        json.dumps({"language": "en", "messages": [system], "turns": [TURN, {"user": "and?"}]})
    )
    [dialogue] = read(path, parse_dialogue)
    assert dialogue.turns[0].messages == [system, USER]
    assert dialogue.questions == "hi\nand?"


def test_questions_for_a_judge(tmp_path):
    path = tmp_path / "questions.jsonl"
    rows = [
        '{"language": "ko", "turns": ["A?", "B?"], "category": "writing", "reference": [null, "C"]}'
    ]
    path.write_text("\n".join([*rows, '{"language": "en", "turns": ["D?"]}']), encoding="utf-8")
    two, one = read_conversations(str(path), "key", parse_question, [], 9)
    assert [turn.messages[0]["content"] for turn in two.turns] == ["A?", "B?"]
    assert (two.category, two.reference(0), two.reference(1), one.reference(0)) == (
        "writing",
        None,
        "C",
        None,
    )


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ('{"language": "ko"}', 'needs the fields "language" and "turns"; turns is missing'),
        ('{"language": "ko", "turns": "A?"}', '"turns" is a list of the user'),
        ('{"language": "ko", "turns": ["A?", " "]}', '"turns" is a list of the user'),
        ('{"language": "ko", "turns": []}', '"turns" is a list of 1 to 5 messages'),
        (
            '{"language": "ko", "turns": ["A?"], "reference": "B"}',
            '"reference" is a list with a good reply',
        ),
    ],
)
def test_a_bad_question_is_named_by_its_line(tmp_path, row, sentence):
    path = tmp_path / "questions.jsonl"
    path.write_text('{"language": "en", "turns": ["D?"]}\n' + row, encoding="utf-8")
    with pytest.raises(UserError) as raised:
        read_conversations(str(path), "key", parse_question, [], 9)
    assert f"{path}, line 2" in str(raised.value)
    assert sentence in str(raised.value)


@pytest.mark.parametrize(
    ("parse", "row", "sentence"),
    [
        (parse_prompt, {"language": "ko", "mesages": [USER]}, 'the field "mesages" is not known .did you mean "messages"'),
        (parse_prompt, {"language": "ko", "messages": [{**USER, "name": "x"}]}, 'the field "name" is not known'),
        (parse_prompt, {"language": "ko", "messages": [USER], "safe": "yes"}, '"safe" is true or false'),
        (parse_instruction, {**INSTRUCTION, "categorie": "x"}, 'did you mean "category"'),
        (parse_instruction, {**INSTRUCTION, "checks": [{"name": "sentence"}]}, 'did you mean "sentences"'),
        (parse_instruction, {**INSTRUCTION, "checks": [{"name": "contains", "wrods": ["a"]}]}, 'did you mean "words"'),
        (parse_dialogue, {"language": "ko", "turns": [TURN, {**TURN, "cheks": []}]}, 'turn 2: the field "cheks" .* "checks"'),
        (parse_question, {"language": "ko", "turns": ["A?"], "references": ["B"]}, 'did you mean "reference"'),
        (parse_question, {"language": "ko", "turns": ["A?"], "reference": ["B", "C"]}, "more entries"),
        (parse_question, {"language": "ko", "turns": ["A?"], "messages": [USER]}, "must not be the user's"),
    ],
)  # fmt: skip
def test_a_field_that_nobody_reads_is_an_error_with_the_nearest_name(
    tmp_path, parse, row, sentence
):
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n" + json.dumps(row))
    with pytest.raises(UserError, match=sentence) as raised:
        read(path, parse)
    assert f"{path}, line 2" in str(raised.value)


def test_a_question_has_a_system_prompt_and_any_line_an_id(tmp_path):
    path = tmp_path / "questions.jsonl"
    system = {"role": "system", "content": "be brief"}
    row = {
        "id": 7,
        "language": "en",
        "messages": [system],
        "turns": ["A?", "B?"],
        "comment": "ours",
    }
    path.write_text(json.dumps(row))
    [question] = read(path, parse_question)
    assert [turn.messages for turn in question.turns] == [
        [system, {"role": "user", "content": "A?"}], [{"role": "user", "content": "B?"}],
    ]  # fmt: skip


def test_what_the_limit_leaves_out_is_said(tmp_path, capsys):
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join([json.dumps({"language": "ko", "messages": [USER]})] * 3))
    read(path, limit=2)
    assert "has 3 in ko; the first 2 of each language are asked" in " ".join(
        capsys.readouterr().err.split()
    )
