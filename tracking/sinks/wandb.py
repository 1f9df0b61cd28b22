"""Weights & Biases, online or offline: the module that speaks to wandb (its neighbours read its files and formats).

What was measured with wandb 0.31 and is guarded against here: rows are lost on a kill unless the log is flushed every
second; W&B's own step drops or shifts rows after a resume, so it is never used; tables are copied to the home directory
unless told otherwise; after a failed start online, the run id stays taken until wandb is torn down; Slurm sends its
signals to all processes of a task, and SIGTERM ends wandb's service before the training has logged its last rows.
"""

from __future__ import annotations

import http.client
import os
import shlex
import signal
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from queue import Queue
from typing import Any, Literal

# read at import; else a start that fails makes wandb's own telemetry print its retries
os.environ.setdefault("WANDB_ERROR_REPORTING", "false")

import wandb
from wandb.sdk.lib.wbauth import read_netrc_auth

from cpt_merge.core.errors import UserError
from cpt_merge.core.progress import say
from cpt_merge.tracking.config import TrackingConfig
from cpt_merge.tracking.redaction import without_secrets
from cpt_merge.tracking.sinks.local import (
    STEP,
    TOKENS,
    Artifact,
    Cell,
    Row,
    RunIdentity,
    read_log,
    row_key,
)
from cpt_merge.tracking.sinks.wandb_history import (
    Held,
    Journal,
    attempts,
    held_rows,
    is_offline,
    marker,
    mend,
    not_uploaded,
)

PROBE_TIMEOUT = 5.0  # seconds for the server to answer at all
INIT_TIMEOUT = 30.0  # seconds for the server to open the run
FINISH_TIMEOUT = 60.0  # seconds to upload what is left when the stage ends
FINISH_MARGIN = 5.0  # seconds more, for a wandb that does not even come back after that

Mode = Literal["online", "offline"]

_open_runs: set[str] = set()  # ids; the merge's run is open within training's


def start_wandb(config: TrackingConfig, run: RunIdentity, directory: Path) -> WandbCarrier | None:
    """Open the stage's W&B run under `directory`, and say in one line which way. None: only the local log.

    Raises `UserError` if `carrier: online` finds no key. A server that does not answer never stops a stage:
    the run is then offline.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for attempt in not_uploaded(directory, run.run_id):
        mend(attempt)
    os.environ["WANDB_DATA_DIR"] = str(
        directory / "wandb"
    )  # where tables are staged; sync needs them
    with _deaf_to_slurm():
        return _start(config, run, directory)


@contextmanager
def _deaf_to_slurm() -> Iterator[None]:
    """Threads and processes that are started within do not get SIGUSR1, Slurm's warning: they inherit the mask."""
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def check_reachable(config: TrackingConfig) -> None:
    """Raises `UserError` if the server does not answer or there is no key for it."""
    settings = _environment()
    mode, reason = _choose_mode(
        config.model_copy(update={"carrier": "online"}), "online", settings.base_url
    )
    if mode != "online":
        raise UserError(f"W&B cannot be reached ({reason}); try again when it can.")


def continue_online(config: TrackingConfig, run: RunIdentity, directory: Path) -> WandbCarrier:
    """Open a run that has ended once more, to upload what is missing. Raises `UserError` where that cannot be."""
    os.environ["WANDB_DATA_DIR"] = str(directory / "wandb")
    check_reachable(config)
    try:
        return WandbCarrier(
            partial(_init, config, run, directory, "online"), run, directory, "online"
        )
    except wandb.Error as error:
        raise UserError(
            f"W&B cannot be reached ({str(error).splitlines()[0]}); try again when it can."
        ) from None


def _start(config: TrackingConfig, run: RunIdentity, directory: Path) -> WandbCarrier | None:
    defaults = _environment()
    if config.carrier == "auto" and defaults.mode == "disabled":
        return None
    mode, reason = _choose_mode(config, defaults.mode, defaults.base_url)
    if mode == "online":
        try:
            carrier = WandbCarrier(
                partial(_init, config, run, directory, mode), run, directory, mode
            )
        except wandb.Error as error:
            mode, reason = "offline", str(error).splitlines()[0]
            if _open_runs:
                say(f"W&B: {run.stage} has only its local log ({reason})")
                return None
            wandb.teardown()  # frees the run id, and would end the other runs
        else:
            say(f"W&B: online, {carrier.run.url}")
            return carrier
    carrier = WandbCarrier(partial(_init, config, run, directory, mode), run, directory, mode)
    say(f"W&B: offline ({reason})")
    return carrier


def _environment() -> wandb.Settings:
    """wandb's settings: its own, and those of the environment. Raises `UserError` if those are wrong."""
    try:
        return wandb.setup(settings=wandb.Settings(silent=True)).settings
    except ValueError as error:  # pydantic's are of that kind; their second line names the setting, the third the fault
        reason = " ".join(without_secrets(str(error)).split("\n")[1:3])
        raise UserError(
            f"the environment's WANDB_* variables: {reason}; mend or unset them."
        ) from None


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
        return "offline", f"{_without_user(server)} does not answer"
    return "online", ""


def find_key() -> bool:
    """True if there is an API key for the configured server: in the environment, a netrc file or wandb's settings."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    settings = wandb.setup().settings
    return bool(settings.api_key or read_netrc_auth(host=settings.base_url))


def _without_user(address: str) -> str:
    """An address without the name and password that it may hold."""
    scheme, found, rest = address.rpartition("://")
    return scheme + found + rest.rpartition("@")[2]


def _answers(server: str) -> bool:
    """True if the server answers at all, directly or through the proxy that the environment names."""
    try:
        urllib.request.urlopen(server, timeout=PROBE_TIMEOUT).close()
    except urllib.error.HTTPError:
        return True
    except (
        OSError,
        ValueError,
        http.client.HTTPException,
    ):  # also an address that is none, and what speaks no HTTP
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
            console="off",  # what a stage prints may hold anything, and lies in its own log
            disable_git=True,  # a remote's address may hold a token
            disable_code=True,
            x_disable_meta=without_secrets(sys.argv)
            != sys.argv,  # the command line is a part of it
        ),
    )


class WandbCarrier:
    """One W&B run. A thread of its own speaks to wandb, so that neither a network nor wandb is ever waited for.

    Whatever becomes of wandb, the stage goes on with its local log. A service that was ended (by SIGTERM to all
    processes of a Slurm task) is started again, and the run continued.
    """

    def __init__(
        self, open_run: Callable[[], Any], run: RunIdentity, directory: Path, mode: Mode
    ) -> None:
        self._open, self._identity, self._directory = open_run, run, directory
        self.run = open_run()
        self._journal = Journal(Path(self.run.settings.sync_dir))
        self.mode: str = mode
        self.url: str = (self.run.url or "") if mode == "online" else ""
        self._starting_step = self.run.starting_step if mode == "online" else None
        self._has_steps = False
        self._step: float | None = None  # of the newest row
        self._held = Held()  # rows that W&B already has and that will be logged again
        self._given = 0  # rows of the local log that this run was given: a service that ends may take some along
        self._shown: dict[
            str, tuple[float | None, Callable[[], object]]
        ] = {}  # tables and figures, with their steps
        self._lost, self._finished = threading.Event(), False
        self._said: set[str] = set()
        self._calls: Queue[Callable[[], object] | None] = Queue()
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()
        _open_runs.add(run.run_id)

    def _work(self) -> None:
        while call := self._calls.get():
            self._do(call)

    def _do(self, call: Callable[[], object]) -> None:
        if self._lost.is_set():
            return
        try:
            if _service_has_ended():
                self._continue_run()
            try:
                call()
            except Exception as error:
                if self._lost.is_set():  # given up while it waited
                    return
                if not _ends_soon():
                    self._complain(f"left something out ({_reason(error)}); the local log has it")
                    return
                self._continue_run()
                call()
        except Exception as error:
            self._lost.set()
            say(
                f"W&B: its service is gone ({type(error).__name__}: {error}); from here on only the local log is kept"
            )
            say(
                f"W&B: what is missing there later: cpt-merge sync {shlex.quote(_shown(self._directory))}"
            )

    def _complain(self, text: str) -> None:
        """Say something once."""
        if text not in self._said:
            self._said.add(text)
            say(f"W&B: {text}")

    def _continue_run(self) -> None:
        """Open the run again, and send again what the service took along."""
        if _service_has_ended():
            _forget_service()
        mend(attempts(self._directory, self._identity.run_id)[-1])
        with _deaf_to_slurm():
            self.run, self._has_steps = self._open(), False
        at_server = self.run.starting_step if self.mode == "online" else None
        arrived = held_rows(self._directory, self._identity.run_id, at_server)
        self._journal = Journal(Path(self.run.settings.sync_dir))
        for row in read_log(self._directory).rows[: self._given]:
            if new := arrived.without(_without_time(row)):
                self._log(new)
        for name, (step, make) in list(self._shown.items()):
            if arrived.without(_media_row(name, 0, step)):
                self._log(_media_row(name, make(), step))

    def begin(self, kept: Sequence[Row]) -> None:
        """Send the rows that W&B does not have of those that the local log keeps."""
        self._calls.put(lambda: self._begin(kept))

    def _begin(self, kept: Sequence[Row]) -> None:
        self._held = held_rows(self._directory, self._identity.run_id, self._starting_step)
        for row in kept:
            self._log_new(_without_time(row))

    def log(self, row: Mapping[str, float]) -> None:
        """One row of history."""
        self._calls.put(lambda: self._log_new(dict(row)))

    def _log_new(self, row: dict[str, float]) -> None:
        self._step = row.get(STEP, self._step)
        if new := self._held.without(row):
            self._log(new)
        self._given += 1

    def _log(self, row: Mapping[str, Any]) -> None:
        if STEP in row and not self._has_steps:
            # only in runs that have steps: elsewhere every chart would wait for an axis that never comes
            self.run.define_metric(STEP)
            self.run.define_metric(TOKENS)
            self.run.define_metric("*", step_metric=STEP, step_sync=False)
            self._has_steps = True
        self._journal.write(self.run.step, row_key(row))
        self.run.log(dict(row))

    def _log_media(self, name: str, make: Callable[[], object]) -> None:
        self._log(_media_row(name, make(), self._step))
        self._shown[name] = (self._step, make)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
        """A W&B table."""
        names, data = list(columns), [list(row) for row in rows]
        self._calls.put(
            lambda: self._log_media(name, lambda: wandb.Table(names, data, allow_mixed_types=True))
        )

    def curves(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
        """A chart of lines, which W&B shows in the run's workspace without being told to."""
        if not rows:
            return  # wandb makes no chart of nothing
        points = [list(row) for row in rows]
        lines = {
            curve: [(x, y) for named, x, y in points if named == curve] for curve, _, _ in points
        }
        self._calls.put(lambda: self._log_media(name, lambda: _chart(name, columns[1], lines)))

    def image(self, name: str, path: Path) -> None:
        """A figure."""
        self._calls.put(lambda: self._log_media(name, lambda: wandb.Image(str(path))))

    def summary(self, values: Mapping[str, Any]) -> None:
        """Final values."""
        copied = dict(values)
        self._calls.put(lambda: self.run.summary.update(copied))

    def file(self, name: str, path: Path) -> None:
        """A file of the run; `path` ends with `name`."""
        base = str(path)[: -len(name)]
        self._calls.put(lambda: self.run.save(str(path), base_path=base, policy="now"))

    def artifact(self, artifact: Artifact) -> None:
        """A reference to a directory or file, by our own digest: no byte of it is read."""
        self._calls.put(lambda: self._artifact(artifact))

    def _artifact(self, artifact: Artifact) -> None:
        made = wandb.Artifact(artifact.name, type=artifact.kind, metadata=asdict(artifact))
        # the digest is in the name of the entry, so that other content is another version
        made.add_reference(artifact.uri, name=artifact.digest.replace(":", "-"), checksum=False)
        # `use_artifact` needs a server; what it does with an artifact that is new is this, and that works offline too
        self.run._log_artifact(made, use_after_commit=artifact.used)

    def alert(self, title: str, text: str) -> None:
        """A W&B alert: mail or Slack, as the user's account says."""
        self._calls.put(lambda: self.run.alert(title, text))

    def finish(self, failed: bool) -> None:
        """Close the run within a bounded time, and say how to upload what was not uploaded."""
        self._calls.put(lambda: self._finish(failed))
        self._calls.put(None)
        self._thread.join(FINISH_TIMEOUT + FINISH_MARGIN)
        _open_runs.discard(self._identity.run_id)
        if not self._finished:
            self._abandon()
        left = not_uploaded(self._directory, self._identity.run_id)
        if any(not is_offline(path) for path in left):
            say(
                f"W&B: not all was uploaded; later: cpt-merge sync {shlex.quote(_shown(self._directory))}"
            )
        elif left:
            say(
                f"W&B: logged offline; upload it with: wandb sync {shlex.join(_shown(path) for path in left)}"
            )

    def _finish(self, failed: bool) -> None:
        with suppress(TimeoutError):
            self.run.finish(exit_code=int(failed))
            self._finished = True
            if self.mode == "online":
                marker(Path(self.run.settings.sync_dir)).touch()

    def _abandon(self) -> None:
        """End a service that does not come to an end: at exit wandb would wait for it, for as long as it takes."""
        self._lost.set()
        if not _open_runs:
            with suppress(Exception):
                _service_process().kill()
            _forget_service()


def _reason(error: Exception) -> str:
    """What is amiss, without the names of temporary files: a full disk is said once, not for each table."""
    return (isinstance(error, OSError) and error.strerror) or f"{type(error).__name__}: {error}"


def _without_time(row: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in row.items() if name != "time"}


def _media_row(name: str, value: object, step: float | None) -> dict[str, Any]:
    return {name: value} | ({} if step is None else {STEP: step})


def _service_process() -> Any:
    """The process of wandb's service (private to wandb), None if it has none of its own."""
    started = wandb.setup().ensure_service()._proc
    return started and started._process


def _forget_service() -> None:
    """Let wandb start another service. It tells this one to end, which it has, and would end the process for that."""
    with suppress(Exception, SystemExit):
        wandb.teardown()


def _service_has_ended() -> bool:
    """Whether wandb's service is dead: a dead one takes the next row, and loses it."""
    process = _service_process()
    return process is not None and process.poll() is not None


def _chart(name: str, x_name: str, lines: Mapping[Cell, Sequence[tuple[Cell, Cell]]]) -> Any:
    xs, ys = (
        [[point[place] for point in points] for points in lines.values()] for place in range(2)
    )
    return wandb.plot.line_series(
        xs, ys, keys=[str(curve) for curve in lines], title=name, xname=x_name
    )


def _ends_soon() -> bool:
    """Whether the service has ended, or ends within the second: a call may fail before its end is seen."""
    for _ in range(10):
        if _service_has_ended():
            return True
        time.sleep(0.1)
    return False


def _shown(path: Path) -> str:
    """The path as the user would type it from here."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
