"""No key, token or password in any byte of a log: local, W&B's on disk, or what a server gets."""

import subprocess
from pathlib import Path

import pytest

from cpt_merge.core.redaction import without_secrets
from tests.tracking.conftest import KEY

SECRETS = {
    "HF_TOKEN": "hf_" + "Abcdefgh1234" * 2,
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
    "MY_PASSWORD": "correct-horse-battery",
}
IN_ADDRESS = "hunter2hunter2"

STAGE = f"""
from pathlib import Path
import os, sys
from cpt_merge.launcher.identity import origin
from cpt_merge.tracking import TrackingConfig, start_tracker
from cpt_merge.tracking import Artifact
address = "https://me:{IN_ADDRESS}@host/data.jsonl"
endpoint = "https://host/v1?api_key=" + os.environ["MY_PASSWORD"]
recipe = {{"corpus": {{"sources": [{{"path": address}}]}}, "endpoint": endpoint}}
settings = {{"recipe": recipe, "inputs": {{"text " + address: "0"}}, "origin": origin()}}
tracking = TrackingConfig(tags=["by " + os.environ["HF_TOKEN"]])
tracker = start_tracker(tracking, "training", "demo", "g", Path(sys.argv[1]), settings, "secret")
tracker.artifact(Artifact("text", "text", address, "0", used=True))
tracker.log({{"train/loss": 1.0}}, step=1)
tracker.alert("training failed", f"{{address}} cannot be read with {{os.environ['HF_TOKEN']}}")
print("printed by the stage:", os.environ["AWS_SECRET_ACCESS_KEY"], flush=True)
tracker.finish()
"""


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_no_secret_in_any_byte_of_a_log(
    mode: str, tmp_path: Path, server, monkeypatch, processes
) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    if mode == "offline":
        monkeypatch.setenv("WANDB_MODE", "offline")
    script = tmp_path / "stage.py"
    script.write_text(STAGE)
    log = tmp_path / "log"
    repository = tmp_path / "repository"
    subprocess.run(["git", "init", "-q", str(repository)], check=True)
    remote = f"https://me:{IN_ADDRESS}@host/project.git"
    subprocess.run(["git", "-C", str(repository), "remote", "add", "origin", remote], check=True)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    token = f"hub.token={SECRETS['HF_TOKEN']}"
    done = processes.run_python(script, log, token, cwd=repository)
    assert done.returncode == 0, done.stderr

    written = {
        str(path): path.read_bytes()
        for path in log.rglob("*")
        if path.is_file() and not path.is_symlink()
    }
    assert any(name.endswith(".wandb") for name in written)
    assert ("secret" in server.runs) == (mode == "online")
    written |= {f"request {number}": request for number, request in enumerate(server.received)}
    for secret in (*SECRETS.values(), IN_ADDRESS, KEY):
        assert [name for name, content in written.items() if secret.encode() in content] == []
    assert b"https://***@host/data.jsonl" in written[str(log / "run.json")], (
        "what is no secret is still there"
    )


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://user:pass@host/a", "https://***@host/a"),
        ("https://host/a?token=abc&x=1", "https://host/a?token=***&x=1"),
        ("cpt-merge run r.yaml hub.api_key=abc", "cpt-merge run r.yaml hub.api_key=***"),
        ("https://a:p:w@d@host/x", "https://***@host/x"),
        ("https://host/a?sv=1&sig=abc", "https://host/a?sv=1&sig=***"),
        ("write section.key=value.", "write section.key=value."),
        ({"api_key": "abc", "key_variable": "A_KEY"}, {"api_key": "***", "key_variable": "A_KEY"}),
        ("PGPASSWORD=abc psql", "PGPASSWORD=*** psql"),
        ("hub.apikey=abc training.max_new_tokens=4", "hub.apikey=*** training.max_new_tokens=4"),
        ("hf_abcdefghijklmnop", "***"),
        (
            "tokenizer.new_pieces.ko=100 training.tokens=1000",
            "tokenizer.new_pieces.ko=100 training.tokens=1000",
        ),
        (
            "cpt-merge run recipes/demo.yaml training.seed=1",
            "cpt-merge run recipes/demo.yaml training.seed=1",
        ),
        ({"a": ["x:abcdefgh1", 2, None]}, {"a": ["x:***", 2, None]}),
    ],
)
def test_what_is_hidden_and_what_is_not(text: object, shown: object) -> None:
    assert (
        without_secrets(
            text, {"SOME_TOKEN": "abcdefgh1", "KEY": "run", "HOME": "recipes/demo.yaml"}
        )
        == shown
    )


@pytest.mark.parametrize(
    "name",
    [
        "PGPASSWORD",
        "GITHUB_PAT",
        "DB_PASS",
        "OPENAI_APIKEY",
        "DBPASS",
        "MYSQL_PWD",
        "SLURM_JWT",
        "HFTOKEN",
        "GPG_PASSPHRASE",
        "AWS_ACCESS_KEY_ID",
        "HF_TOKENS",
        "openaiApiKey",
    ],
)
def test_values_of_variables_with_such_names_are_hidden(name: str) -> None:
    assert without_secrets("at abcdefgh1.", {name: "abcdefgh1"}) == "at ***."


@pytest.mark.parametrize(
    "name",
    [
        "PWD",
        "OLDPWD",
        "PATH",
        "PYTHONPATH",
        "KEYBOARD",
        "PROXY_BYPASS",
        "GIT_ASKPASS",
        "TOKENIZERS_PARALLELISM",
    ],
)
def test_values_of_other_variables_are_not(name: str) -> None:
    assert without_secrets("/work/run", {name: "/work/run"}) == "/work/run"


def test_a_value_of_less_than_eight_characters_is_a_word_and_stays() -> None:
    assert (
        without_secrets("sesame7 sesame78", {"A_TOKEN": "sesame7", "B_TOKEN": "sesame78"})
        == "sesame7 ***"
    )
