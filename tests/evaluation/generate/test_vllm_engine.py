"""vLLM is started once per model and process, ended after it, and heard when it fails. A program
with the arguments of `vllm serve` stands in for it."""

import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from cpt_merge.core.distributed import Ranks, wait_for
from cpt_merge.core.errors import UserError
from cpt_merge.evaluation.chat_template import read_chat_template
from cpt_merge.evaluation.config import EvaluationConfig
from cpt_merge.evaluation.conversation import prompt
from cpt_merge.evaluation.generate.config import ServerConfig, VllmConfig
from cpt_merge.evaluation.generate.conversations import converse
from cpt_merge.evaluation.generate.vllm import VllmEngine
from cpt_merge.evaluation.gpus import CPU, Gpus
from cpt_merge.evaluation.models import LanguageModel
from cpt_merge.evaluation.run import evaluate
from tests.distributed import run_ranks

STANDS_IN = [sys.executable, "-m", "tests.evaluation.generate.completions_server", "serve"]
PROMPTS = {"suites": ["form"], "max_new_tokens": 12, "samples_shown": 0}


def config(prompts, **settings):
    vllm = {"command": STANDS_IN, **settings}
    return EvaluationConfig(**PROMPTS, prompts=str(prompts), engine="vllm", vllm=vllm)


@pytest.fixture
def starts(tmp_path, monkeypatch):
    """The command lines of the servers that were started, by process."""
    folder = tmp_path / "starts"
    folder.mkdir()
    monkeypatch.setenv("RECORD_STARTS", str(folder))
    return lambda: {int(path.name): path.read_text() for path in folder.iterdir()}


def measured(models, config, folder=None):
    """The metrics; servers record their starts in `folder`."""
    torch.set_num_threads(1)
    if folder is not None:  # this process may have been forked from one without the variable
        os.environ["RECORD_STARTS"] = str(folder)
    found = evaluate(models, config)
    return {name: value for name, value in found.items() if "tokens_per_second" not in name}


@pytest.fixture(scope="session")
def both(models_of_two_vocabularies):
    chat = models_of_two_vocabularies["chat"]
    return {"one": chat, "other": chat}


def alive(pid):
    """Whether a process runs; one that has ended may wait for its parent."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.mark.slow
def test_each_process_starts_one_for_the_model_and_the_metrics_are_the_same(
    both, prompts_file, starts, tmp_path
):
    one = {"one": both["one"]}
    alone = measured(one, EvaluationConfig(**PROMPTS, prompts=str(prompts_file)))
    together = run_ranks(measured, 2, one, config(prompts_file), tmp_path / "starts")
    assert together == [alone, alone]
    assert len(starts()) == 2
    assert not any(map(alive, starts()))


@pytest.mark.slow
def test_each_model_has_its_own(both, prompts_file, starts):
    measured(both, config(prompts_file))
    names = {line.split("--served-model-name ")[1].split()[0] for line in starts().values()}
    assert names == {"one", "other"}
    assert not any(map(alive, starts()))


def test_what_it_says_when_it_fails_is_shown(both, prompts_file):
    asked = config(prompts_file, arguments=["--max-model-len", "many"])
    with pytest.raises(UserError, match=r"model one: vLLM ended with exit code 2 \(.*invalid int"):
        evaluate(both, asked)


@pytest.mark.slow
def test_a_failure_on_one_process_ends_all(both, prompts_file):
    asked = config(prompts_file, arguments=["--max-model-len", "many"])
    assert all(run_ranks(refusal, 2, both, asked))


def refusal(models, config):
    try:
        evaluate(models, config)
    except UserError as error:
        return str(error).startswith("model one: vLLM ended")
    return False


def test_one_that_is_never_ready_is_given_up(both, prompts_file, starts):
    sleep = "import os, time; open(os.environ['RECORD_STARTS'] + f'/{os.getpid()}', 'w'); time.sleep(600)"
    sleeps = [sys.executable, "-c", sleep]
    asked = config(prompts_file, command=sleeps, start_timeout=3)
    with pytest.raises(UserError, match=r"not ready after 3 s.*evaluation\.vllm\.start_timeout"):
        evaluate(both, asked)
    assert starts()
    assert not any(map(alive, starts()))


def test_it_ends_with_a_process_that_is_killed(both, prompts_file, starts, processes):
    code = (
        "import sys; from cpt_merge.evaluation.run import evaluate\n"
        "from tests.evaluation.generate.test_vllm_engine import config\n"
        f"evaluate({ {name: str(path) for name, path in both.items()}!r}, config({str(prompts_file)!r}))"
    )
    process = processes.python("-c", code)
    process.wait_until(starts, "the server to start")
    os.kill(process.pid, signal.SIGKILL)
    process.finish()
    [server] = starts()
    assert wait_for(lambda: not alive(server), "the server to end", timeout=60)


def test_a_program_that_is_not_there(both, prompts_file):
    with pytest.raises(UserError, match=r"no program nowhere/vllm here.*evaluation\.vllm\.command"):
        evaluate(both, config(prompts_file, command=["nowhere/vllm", "serve"]))


def test_the_setting_that_asks_for_it_is_named():
    nowhere = {"command": ["nowhere/vllm", "serve"]}
    asked = EvaluationConfig(engine_of={"merged": "vllm"}, vllm=nowhere)
    with pytest.raises(UserError, match=r"^evaluation\.engine_of\.merged = vllm, and there is no"):
        asked.check_vllm()


@pytest.mark.slow
def test_a_key_that_it_wants_is_named_as_soon_as_it_answers(both, prompts_file, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    asked = config(prompts_file, arguments=["--api-key", "secret"])
    said = r"OPENAI_API_KEY \(evaluation\.server\.key_variable\) is not set"
    with pytest.raises(UserError, match=said):
        evaluate({"one": both["one"]}, asked)


@pytest.mark.slow
def test_it_has_the_name_that_the_recipe_gives_it_and_its_log_is_named_when_it_is_gone(
    both, starts
):
    model = LanguageModel.open("one", both["one"])
    server = ServerConfig(names={"one": "served"}, attempts=1)
    vllm = VllmConfig(command=STANDS_IN)
    engine = VllmEngine(model, Ranks(), server, vllm, both["one"], CPU, "evaluation.engine")
    try:
        engine.start()
        [(process, line)] = starts().items()
        assert "--served-model-name served" in line
        os.kill(process, signal.SIGKILL)
        asked = [prompt("en", [{"role": "user", "content": "Where?"}])]
        with pytest.raises(UserError, match=r"; vLLM's log is .*one\.log"):
            converse(engine, read_chat_template(both["one"]), asked, EvaluationConfig())
    finally:
        engine.close()


class TestGpus:
    """What vLLM is told of the GPUs; there are none here."""

    def engine(self, directory: Path, gpus: Gpus) -> VllmEngine:
        model = LanguageModel.open("one", directory)
        return VllmEngine(model, Ranks(), ServerConfig(), VllmConfig(), directory, gpus, "x")

    def test_a_process_gives_it_its_own(self, both, monkeypatch):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
        monkeypatch.setenv("RANK", "1")
        engine = self.engine(both["one"], Gpus(2, 2))
        assert engine._environment()["CUDA_VISIBLE_DEVICES"] == "6,7"
        assert "RANK" not in engine._environment()
        assert "--tensor-parallel-size 2" in " ".join(engine._arguments())

    def test_without_a_list_they_are_numbered(self, both, monkeypatch):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        assert self.engine(both["one"], Gpus(3, 1))._environment()["CUDA_VISIBLE_DEVICES"] == "3"
        assert "CUDA_VISIBLE_DEVICES" not in self.engine(both["one"], CPU)._environment()
