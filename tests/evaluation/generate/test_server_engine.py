"""A server gives the replies that the model gives in this process, or the evaluation says why not."""

import datetime
import json
import shutil
import threading

import pytest

import cpt_merge.evaluation.generate.endpoint
from cpt_merge.core.distributed import Ranks
from cpt_merge.core.errors import UserError
from cpt_merge.evaluation.chat_template import read_chat_template
from cpt_merge.evaluation.config import EvaluationConfig
from cpt_merge.evaluation.conversation import Conversation, Turn, prompt
from cpt_merge.evaluation.generate.config import ServerConfig
from cpt_merge.evaluation.generate.conversations import converse
from cpt_merge.evaluation.generate.server import ServerEngine
from cpt_merge.evaluation.generate.transformers import TransformersEngine
from cpt_merge.evaluation.models import LanguageModel
from tests.evaluation.conftest import TEXTS
from tests.evaluation.generate.completions_server import Completions, CompletionsServer, Kind
from tests.evaluation.thinkers import PLAIN, write_thinker

ALONE = Ranks()
CONFIG = EvaluationConfig(max_new_tokens=24, batch_size=4)


def user(text):
    return [{"role": "user", "content": text}]


def asked():
    single = [prompt(language, user(text)) for language, texts in TEXTS.items() for text in texts]
    return [*single, Conversation("ko", tuple(Turn(user(text)) for text in TEXTS["ko"]))]


@pytest.fixture
def server_of(monkeypatch):
    monkeypatch.setattr(cpt_merge.evaluation.generate.endpoint, "FIRST_PAUSE", 0.01)
    servers = []

    def start(directory, name="chat", **kind):
        server = CompletionsServer(Completions(directory, name, Kind(**kind)))
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def exchanges(engine, directory, config=CONFIG, conversations=None):
    template = read_chat_template(directory)
    return converse(engine, template, conversations or asked(), config).exchanges


def engine_of(directory, url, **settings):
    model = LanguageModel.open("chat", directory)
    setting = "evaluation.engine_of.chat"
    return ServerEngine(model, ALONE, ServerConfig(**settings), url, directory, setting)


@pytest.fixture(scope="session")
def here(models_of_two_vocabularies):
    directory = models_of_two_vocabularies["chat"]
    engine = TransformersEngine(LanguageModel.open("chat", directory), ALONE)
    return exchanges(engine, directory)


KINDS = {
    "vllm": {},
    "sglang": {"returns_ids": False},
    "tgi": {"takes_ids": False, "returns_ids": False, "knows_stop_ids": False},
}


class TestReplies:
    def test_they_are_those_of_the_model_in_this_process(
        self, server_of, models_of_two_vocabularies, here
    ):
        directory = models_of_two_vocabularies["chat"]
        server = server_of(directory)
        assert exchanges(engine_of(directory, server.url), directory) == here
        assert len({reply.text for one in here for reply in one.replies}) > 5

    @pytest.mark.parametrize("kind", KINDS)
    def test_thought_answer_and_end_are_read_whatever_the_server_returns(
        self, server_of, tmp_path, kind
    ):
        says = ["<think>", "음", "</think>", "서울", "입니다.", "</s>"]
        directory = write_thinker(tmp_path / "m", says)
        server = server_of(directory, **KINDS[kind])
        of_server = exchanges(engine_of(directory, server.url), directory)
        model = LanguageModel.open("chat", directory)
        assert of_server == exchanges(TransformersEngine(model, ALONE), directory)
        reply = of_server[0].replies[0]
        assert (reply.text, reply.thought, reply.stopped) == ("서울입니다.", "음", True)
        assert (reply.tokens, reply.thought_tokens) == (6, 3)

    @pytest.mark.parametrize("kind", KINDS)
    def test_one_that_never_ends_has_not_stopped(self, server_of, tmp_path, kind):
        directory = write_thinker(tmp_path / "m", ["서울", "서울"])
        server = server_of(directory, **KINDS[kind])
        config, one = EvaluationConfig(max_characters=9), [prompt("ko", user("?"))]
        [exchange] = exchanges(engine_of(directory, server.url), directory, config, one)
        [reply] = exchange.replies
        assert (reply.text, reply.stopped) == ("서울" * 4 + "서", False)

    def test_the_bos_that_a_server_puts_before_a_text_is_not_sent(
        self, server_of, models_of_two_vocabularies, tmp_path
    ):
        """The template writes it as well."""
        directory = shutil.copytree(models_of_two_vocabularies["chat"], tmp_path / "m")
        definition = json.loads((directory / "tokenizer.json").read_text())
        definition["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
        }  # fmt: skip
        (directory / "tokenizer.json").write_text(json.dumps(definition))
        server, one = server_of(directory, takes_ids=False), [prompt("en", user("Where?"))]
        engine = engine_of(directory, server.url)
        assert engine.model.beginning == "<s>"
        here = TransformersEngine(LanguageModel.open("chat", directory), ALONE)
        expected = exchanges(here, directory, conversations=one)
        assert exchanges(engine, directory, conversations=one) == expected
        assert server.completions.asked[-1]["prompt"] == "[INST] Where? [/INST]"

    def test_no_weights_are_loaded(self, server_of, models_of_two_vocabularies):
        directory = models_of_two_vocabularies["chat"]
        engine = engine_of(directory, server_of(directory).url)
        exchanges(engine, directory)
        assert "loaded" not in vars(engine.model)

    def test_a_shorter_server_leaves_less_room(self, server_of, models_of_two_vocabularies, capsys):
        directory = models_of_two_vocabularies["chat"]
        server = server_of(directory, positions=40)
        exchanges(engine_of(directory, server.url), directory)
        assert "prompts as long as its 40 positions" in capsys.readouterr().err
        _, *requests = server.completions.asked
        assert requests
        assert all(len(one["prompt"]) + one["max_tokens"] <= 40 for one in requests)


class TestRequests:
    def test_sampling_leaves_nothing_to_the_servers_defaults(
        self, server_of, models_of_two_vocabularies
    ):
        directory = models_of_two_vocabularies["chat"]
        server = server_of(directory)
        config = CONFIG.model_copy(update={"temperature": 0.7, "top_p": 0.9, "seed": 3})
        exchanges(engine_of(directory, server.url), directory, config)
        _, *requests = server.completions.asked  # the first one asks whether ids are taken
        [settings] = {
            tuple(one[name] for name in ("temperature", "top_p", "top_k", "repetition_penalty"))
            for one in requests
        }
        assert settings == (0.7, 0.9, -1, 1.0)
        assert len({one["seed"] for one in requests}) == len(requests)

    def test_fields_of_the_recipe_replace_and_remove(self, server_of, models_of_two_vocabularies):
        directory = models_of_two_vocabularies["chat"]
        server = server_of(directory, unknown_fields=("return_token_ids",))
        engine = engine_of(directory, server.url, request={"return_token_ids": None, "min_p": 0})
        exchanges(engine, directory)
        assert {one["min_p"] for one in server.completions.asked} == {0}


class TestRefusals:
    def refused(self, directory, url, **settings):
        with pytest.raises(UserError) as error:
            exchanges(engine_of(directory, url, attempts=2, **settings), directory)
        return str(error.value)

    def test_a_server_that_is_not_there(self, models_of_two_vocabularies):
        said = self.refused(models_of_two_vocabularies["chat"], "http://127.0.0.1:9/v1")
        assert said.startswith("model chat: http://127.0.0.1:9/v1/models: ")
        assert said.endswith("start the server, or correct evaluation.engine_of.chat.")

    def test_another_model(self, server_of, models_of_two_vocabularies):
        url = server_of(models_of_two_vocabularies["base"], name="base").url
        directory = models_of_two_vocabularies["chat"]
        said = self.refused(directory, url)
        assert f"{url} serves base, and not {directory}" in said
        assert "correct evaluation.engine_of.chat, or set evaluation.server.names.chat" in said

    def test_another_tokenizer_under_the_right_name(self, server_of, models_of_two_vocabularies):
        url = server_of(models_of_two_vocabularies["base"], takes_ids=False).url
        said = self.refused(models_of_two_vocabularies["chat"], url)
        assert "so it has another tokenizer or adds tokens" in said

    def test_a_token_that_the_server_adds(self, server_of, models_of_two_vocabularies):
        directory = models_of_two_vocabularies["chat"]
        url = server_of(directory, adds="<s>").url
        assert "adds tokens" in self.refused(directory, url)

    def test_a_field_that_the_server_does_not_know(self, server_of, models_of_two_vocabularies):
        directory = models_of_two_vocabularies["chat"]
        url = server_of(directory, unknown_fields=("repetition_penalty",)).url
        said = self.refused(directory, url)
        assert "unrecognised field repetition_penalty" in said
        assert said.endswith("is left out by evaluation.server.request={FIELD: null}.")

    def test_a_server_that_fails_in_the_middle(self, server_of, models_of_two_vocabularies):
        directory = models_of_two_vocabularies["chat"]
        said = self.refused(directory, server_of(directory, fails_after=4).url)
        assert "status 500 Internal Server Error, " in said
        assert "out of memory" in said
        assert said.endswith("wait until the server is ready, or look into its log.")

    def test_a_page_instead_of_a_list(self, server_of, models_of_two_vocabularies):
        directory = models_of_two_vocabularies["chat"]
        said = self.refused(directory, server_of(directory, page="<html>").url)
        assert "answers what is not JSON; correct evaluation.engine_of.chat or" in said

    @pytest.mark.parametrize(
        ("settings", "answered"),
        [
            ({"key": "right"}, "models"),
            ({"key": "right", "lists_to_all": True}, "completions"),
        ],
    )
    @pytest.mark.parametrize("key", ["", "wrong"])
    def test_a_key_that_is_missing_or_wrong(
        self, server_of, models_of_two_vocabularies, monkeypatch, settings, answered, key
    ):
        monkeypatch.setenv("A_KEY", key)
        directory = models_of_two_vocabularies["chat"]
        server = server_of(directory, **settings)
        said = self.refused(directory, server.url, key_variable="A_KEY")
        assert f"{server.url}/{answered}: status 401 Unauthorized" in said
        is_wrong = "is refused; correct it" if key else "is not set; set it to a key"
        assert f"variable A_KEY (evaluation.server.key_variable) {is_wrong}" in said
        assert ("or set evaluation.server.names.chat" in said) == (answered == "models")
        assert server.completions.asked == []

    def test_the_right_key(self, server_of, models_of_two_vocabularies, monkeypatch, here):
        monkeypatch.setenv("A_KEY", "right")
        directory = models_of_two_vocabularies["chat"]
        url = server_of(directory, key="right").url
        assert exchanges(engine_of(directory, url, key_variable="A_KEY"), directory) == here

    def test_an_error_of_status_200_that_may_pass_is_asked_again(
        self, server_of, models_of_two_vocabularies, here
    ):
        directory = models_of_two_vocabularies["chat"]
        url = server_of(directory, errors=({"code": 503, "message": "loading"},)).url
        assert exchanges(engine_of(directory, url, attempts=2), directory) == here

    def test_a_server_without_a_list_needs_a_name(
        self, server_of, models_of_two_vocabularies, capsys
    ):
        directory = models_of_two_vocabularies["chat"]
        url = server_of(directory, name="served", lists=False).url
        assert "set evaluation.server.names.chat" in self.refused(directory, url)
        exchanges(engine_of(directory, url, names={"chat": "served"}), directory)
        assert "whether it serves served is not checked" in capsys.readouterr().err


def test_the_model_is_known_by_its_directory(server_of, models_of_two_vocabularies, monkeypatch):
    directory = models_of_two_vocabularies["chat"]
    monkeypatch.chdir(directory.parent)
    for name in (str(directory), directory.name):
        server = server_of(directory, name=name)
        exchanges(engine_of(directory, server.url), directory)
        assert {one["model"] for one in server.completions.asked} == {name}


class TestAnswers:
    @pytest.mark.parametrize(
        ("kind", "said"),
        [
            ({"ends_because": "abort"}, "ends a reply because of 'abort', which is neither"),
            ({"adds_to_ids": 10**6}, "returns token ids that are not among the model's"),
        ],
    )
    def test_what_is_no_reply_stops_the_evaluation(
        self, server_of, models_of_two_vocabularies, kind, said
    ):
        directory = models_of_two_vocabularies["chat"]
        engine = engine_of(directory, server_of(directory, **kind).url)
        with pytest.raises(UserError, match=said):
            exchanges(engine, directory)

    def test_a_server_that_counts_no_tokens_is_said(
        self, server_of, models_of_two_vocabularies, here, capsys
    ):
        directory = models_of_two_vocabularies["chat"]
        found = exchanges(engine_of(directory, server_of(directory, counts=False).url), directory)
        assert found == here
        assert "whether it has the tokenizer of chat is not checked" in capsys.readouterr().err

    def test_a_reply_beyond_the_limit_has_not_stopped(self, server_of, tmp_path):
        directory = write_thinker(tmp_path / "m", ["서울", "서울"], PLAIN)
        server = server_of(directory, ignores_limit=True, returns_ids=False)
        config, one = EvaluationConfig(max_new_tokens=4), [prompt("ko", user("?"))]
        [exchange] = exchanges(engine_of(directory, server.url), directory, config, one)
        [reply] = exchange.replies
        assert (reply.text, reply.stopped) == ("서울" * 4, False)


class TestRecipe:
    @pytest.mark.parametrize("url", ["http://", "http://[::1/v1", "http://127.0.0.1:abc/v1"])
    def test_what_is_no_url_is_refused(self, url):
        with pytest.raises(ValueError, match="this is no URL"):
            EvaluationConfig(engine=url)

    def test_what_cannot_be_sent_is_refused(self):
        with pytest.raises(ValueError, match="date is not JSON serializable; put such a value in"):
            ServerConfig(request={"x": datetime.date(2020, 1, 1)})

    @pytest.mark.parametrize(
        ("name", "said"),
        [
            ("vlm", r'vlm is no engine \(did you mean "vllm"\?\); it is'),
            ("gpu3:8000", "gpu3:8000 is no engine; it is transformers, vllm, or a URL"),
        ],
    )
    def test_what_is_no_engine_is_refused(self, name, said):
        with pytest.raises(ValueError, match=said):
            EvaluationConfig(engine=name)
        with pytest.raises(ValueError, match=said):
            EvaluationConfig(engine_of={"merged": name})

    @pytest.mark.parametrize(
        ("section", "settings"),
        [
            ("server", {"engine_of": {"merged": "http://gpu3:8000/v1"}, "server": {}}),
            ("judge", {"judge": {"url": "http://x", "model": "m"}}),
            ("judge.second", {"judge": {"url": "http://x", "model": "m", "key_variable": "OTHER",
                                        "second": {"url": "http://x", "model": "n"}}}),
            ("safety.moderation", {"safety": {"moderation": {"url": "http://x", "model": "m"}}}),
            ("safety.attributes", {"safety": {"attributes": {"url": "http://x"}}}),
        ],
    )  # fmt: skip
    @pytest.mark.parametrize("key", ["abc…d", "abc\nd"])
    def test_a_key_that_no_header_can_hold_is_refused(self, monkeypatch, section, settings, key):
        given = json.loads(json.dumps(settings))
        asked = given
        for name in section.split("."):
            asked = asked[name]
        asked["key_variable"] = "A_KEY"
        config = EvaluationConfig(**given)
        monkeypatch.setenv("A_KEY", "abcd")
        config.check_keys()
        monkeypatch.setenv("A_KEY", key)
        place = f"evaluation.{section}.key_variable"
        with pytest.raises(UserError, match=rf"A_KEY \({place}\) .* its character 4 is not"):
            config.check_keys()

    @pytest.mark.parametrize("key", ["engine_of", "server"])
    def test_models_that_are_not_evaluated_are_refused(self, key):
        given = {"mreged": "vllm"}
        config = EvaluationConfig(**{key: given if key == "engine_of" else {"names": given}})
        with pytest.raises(UserError, match=r"names mreged, which is none of the models; they are"):
            config.check_models(["base", "merged"])

    def test_a_model_can_have_its_own(self):
        config = EvaluationConfig(engine_of={"merged": "http://gpu3:8000/v1"})
        assert config.engine_for("merged") == "http://gpu3:8000/v1"
        assert config.engine_for("base") == "transformers"
