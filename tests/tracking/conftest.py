import http.server
import threading

import pytest
import wandb

from tests.tracking.server import WandbServer

KEY = "local" + "5ec4e7" * 7  # the form of a key; not one


@pytest.fixture(autouse=True)
def fresh_wandb(monkeypatch, tmp_path):
    """No key, server or mode of the machine the tests run on; wandb reads its environment anew."""
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "no-config"))
    monkeypatch.setenv("WANDB_DATA_DIR", "")  # set by the sink; put back after the test
    yield
    import wandb

    wandb.teardown()


class _Deaf(http.server.BaseHTTPRequestHandler):
    """Answers GET, and refuses everything that opens a run."""

    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def do_POST(self):
        self.send_response(400)
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def deaf_server():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Deaf)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture
def server(monkeypatch):
    """A W&B server of ours, and the environment that leads to it."""
    wandb.teardown()  # an earlier test's service keeps that test's environment
    with WandbServer() as running:
        monkeypatch.setenv("WANDB_BASE_URL", running.url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        monkeypatch.setenv(
            "WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL", "0.5"
        )  # seconds between uploads, else 15
        yield running
