"""Weights & Biases, online or offline. The only module that imports wandb.

What was measured with wandb 0.31 and is guarded against here: rows are lost on a kill unless the log is flushed every
second; W&B's own step drops or shifts rows after a resume, so it is never used; tables are copied to the home directory
unless told otherwise; after a failed start online, the run id stays taken until wandb is torn down.
"""

from __future__ import annotations

import os
import shlex
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

# read at import; else a start that fails makes wandb's own telemetry print its retries
os.environ.setdefault("WANDB_ERROR_REPORTING", "false")

import wandb
from wandb.sdk.lib.wbauth import read_netrc_auth

from core.errors import UserError
from core.progress import say
from tracking.config import TrackingConfig
from tracking.local import STEP, Cell, RunIdentity

PROBE_TIMEOUT = 5.0  # seconds for the server to answer at all
INIT_TIMEOUT = 30.0  # seconds for the server to open the run
FINISH_TIMEOUT = 120.0  # seconds to upload what is left when the stage ends

Mode = Literal["online", "offline"]

_open_runs: set[str] = set()  # ids; the merge's run is open within training's


def start_wandb(config: TrackingConfig, run: RunIdentity, directory: Path) -> WandbCarrier | None:
    """Open the stage's W&B run under `directory`, and say in one line which way. None: only the local log.

    Raises `UserError` if `carrier: online` finds no key. A server that does not answer never stops a stage:
    the run is then offline.
    """
    directory.mkdir(parents=True, exist_ok=True)
    os.environ["WANDB_DATA_DIR"] = str(directory / "wandb")  # where tables are staged; sync needs them
    defaults = wandb.setup(settings=wandb.Settings(silent=True)).settings
    if config.carrier == "auto" and defaults.mode == "disabled":
        return None
    mode, reason = _choose_mode(config, defaults.mode, defaults.base_url)
    if mode == "online":
        try:
            carrier = WandbCarrier(_init(config, run, directory, mode), directory, mode)
        except wandb.Error as error:
            mode, reason = "offline", str(error).splitlines()[0]
            if _open_runs:
                say(f"W&B: {run.stage} has only its local log ({reason})")
                return None
            wandb.teardown()  # frees the run id, and would end the other runs
        else:
            say(f"W&B: online, {carrier.run.url}")
            return carrier
    carrier = WandbCarrier(_init(config, run, directory, mode), directory, mode)
    say(f"W&B: offline ({reason})")
    return carrier


def _choose_mode(config: TrackingConfig, environment_mode: str, server: str) -> tuple[Mode, str]:
    """The mode, and the reason if it is offline."""
    if config.carrier == "offline":
        return "offline", "tracking.carrier"
    if config.carrier == "auto" and environment_mode != "online":
        return "offline", f"WANDB_MODE={environment_mode}"
    if not find_key():
        if config.carrier == "online":
            raise UserError(
                f"tracking.carrier is online but there is no API key for {server}; run `wandb login`, "
                "set WANDB_API_KEY, or choose tracking.carrier=auto."
            )
        return "offline", "no API key"
    if not _answers(server):
        return "offline", f"{server} does not answer"
    return "online", ""


def find_key() -> bool:
    """True if there is an API key for the configured server: in the environment, a netrc file or wandb's settings."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    settings = wandb.setup().settings
    return bool(settings.api_key or read_netrc_auth(host=settings.base_url))


def _answers(server: str) -> bool:
    """True if the server answers at all, directly or through the proxy that the environment names."""
    try:
        urllib.request.urlopen(server, timeout=PROBE_TIMEOUT).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


def _init(config: TrackingConfig, run: RunIdentity, directory: Path, mode: Mode) -> Any:
    return wandb.init(
        project=config.project,
        entity=config.entity,
        tags=config.tags,
        name=run.run_name,
        group=run.group,
        job_type=run.stage,
        id=run.run_id,
        config=run.settings,
        dir=str(directory),
        mode=mode,
        resume="allow",
        settings=wandb.Settings(
            silent=True,
            reinit="create_new",  # the merge logs to a run of its own while training's is still open
            init_timeout=INIT_TIMEOUT,
            finish_timeout=FINISH_TIMEOUT,
            finish_timeout_raises=True,
            x_transaction_log_flush_interval=1,
            disable_git=True,  # a remote's address may hold a token
            disable_code=True,
        ),
    )


class WandbCarrier:
    """One W&B run."""

    def __init__(self, run: Any, directory: Path, mode: Mode) -> None:
        self.run = run
        self.mode: str = mode
        self.url: str = run.url or ""
        self._directory = directory
        self._has_steps = False
        _open_runs.add(run.id)

    def log(self, row: Mapping[str, float]) -> None:
        """One row of history."""
        if STEP in row and not self._has_steps:
            # only in runs that have steps: elsewhere every chart would wait for an axis that never comes
            self.run.define_metric(STEP)
            self.run.define_metric("*", step_metric=STEP)
            self._has_steps = True
        self.run.log(dict(row))

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
        """A W&B table."""
        data = [list(row) for row in rows]
        self.run.log({name: wandb.Table(columns=list(columns), data=data, allow_mixed_types=True)})

    def image(self, name: str, path: Path) -> None:
        """A figure."""
        self.run.log({name: wandb.Image(str(path))})

    def summary(self, values: Mapping[str, Any]) -> None:
        """Final values."""
        self.run.summary.update(dict(values))

    def alert(self, title: str, text: str) -> None:
        """A W&B alert: mail or Slack, as the user's account says."""
        self.run.alert(title, text)

    def finish(self, failed: bool) -> None:
        """Close the run, and say how to upload what was not uploaded."""
        _open_runs.discard(self.run.id)
        try:
            self.run.finish(exit_code=int(failed))
        except TimeoutError:
            say(f"W&B: the upload took longer than {FINISH_TIMEOUT:.0f} s and was left; later:")
            say(f"  wandb sync {shlex.quote(self.run.settings.sync_dir)}")
        offline = [path for path in sorted((self._directory / "wandb").glob("offline-run-*")) if not _is_synced(path)]
        if offline:
            say(f"W&B: logged offline; upload it with: wandb sync {shlex.join(_shown(path) for path in offline)}")


def _shown(path: Path) -> str:
    """The path as the user would type it from here."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _is_synced(directory: Path) -> bool:
    return any(directory.glob("*.wandb.synced"))
