"""Weights & Biases, online or offline.

Measured with wandb 0.31 and guarded against here: rows are lost on a kill unless the log is flushed
every second; W&B's own step drops or shifts rows after a resume, so it is never used; tables are
copied to the home directory unless told otherwise; after a failed start online, the run id stays
taken until wandb is torn down; Slurm sends its signals to all processes of a task, and SIGTERM ends
wandb's service before the training has logged its last rows.
"""

from __future__ import annotations

import http.client
import os
import shlex
import signal
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from queue import Queue
from typing import Any, Literal

from cpt_merge.core.errors import UserError
from cpt_merge.core.progress import say
from cpt_merge.core.redaction import without_secrets
from cpt_merge.tracking.config import TrackingConfig
from cpt_merge.tracking.events import (
    STEP,
    TOKENS,
    Alert,
    Artifact,
    Cell,
    Curves,
    Event,
    File,
    Image,
    Row,
    Scalars,
    Summary,
    Table,
)
from cpt_merge.tracking.sinks.local import RunIdentity, read_log, stored
from cpt_merge.tracking.sinks.wandb_history import (
    Held,
    RowJournal,
    held_rows,
    not_uploaded,
    repair,
    row_key,
)
from cpt_merge.tracking.wandb_compat import (
    attempt_folders,
    find_key,
    forget_service,
    is_offline,
    kill_service,
    log_artifact,
    service_ends_soon,
    service_has_ended,
    synced_marker,
    wandb,
)

PROBE_TIMEOUT = 5.0  # seconds for the server to answer at all
INIT_TIMEOUT = 30.0  # seconds for the server to open the run
FINISH_TIMEOUT = 60.0  # seconds to upload what is left when the stage ends
FINISH_MARGIN = 5.0  # seconds more, for a wandb that does not return even then

Mode = Literal["online", "offline"]

_open_runs: set[str] = set()  # ids; the merge's run is open within training's


def start_wandb(config: TrackingConfig, run: RunIdentity, directory: Path) -> WandbSink | None:
    """Open the stage's W&B run in `directory` and print its mode. None: only the local log.

    Raises `UserError` if the mode is online and there is no key. A server that does not answer
    never stops a stage: the run is then offline.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for attempt in not_uploaded(directory, run.run_id):
        repair(attempt)
    with _without_slurm_signal():
        return _start(config, run, directory)


def _start(config: TrackingConfig, run: RunIdentity, directory: Path) -> WandbSink | None:
    defaults = _environment()
    if config.mode == "auto" and defaults.mode == "disabled":
        return None
    mode, reason = _choose_mode(config, defaults.mode, defaults.base_url)
    if mode == "online":
        try:
            sink = WandbSink(config, run, directory, mode)
        except wandb.Error as error:
            mode, reason = "offline", str(error).splitlines()[0]
            if _open_runs:
                say(f"W&B: {run.stage} has only its local log ({reason})")
                return None
            wandb.teardown()  # frees the run id; it would end other runs
        else:
            say(f"W&B: online, {sink.run.url}")
            return sink
    sink = WandbSink(config, run, directory, mode)
    say(f"W&B: offline ({reason})")
    return sink


def check_key(config: TrackingConfig) -> None:
    """Raise `UserError` if the mode is online and there is no key; the server is not asked."""
    if config.mode == "online":
        _check_key(config, _environment().base_url)


def _check_key(config: TrackingConfig, server: str) -> None:
    if config.mode == "online" and not find_key():
        raise UserError(
            f"tracking.mode is online but there is no API key for {server}; run `wandb login`, "
            "set WANDB_API_KEY, or choose tracking.mode=auto."
        )


def check_reachable(config: TrackingConfig) -> None:
    """Raise `UserError` if the server does not answer or there is no key for it."""
    online = config.model_copy(update={"mode": "online"})
    mode, reason = _choose_mode(online, "online", _environment().base_url)
    if mode != "online":
        raise UserError(f"W&B cannot be reached ({reason}); try again when it can.")


def continue_online(config: TrackingConfig, run: RunIdentity, directory: Path) -> WandbSink:
    """Open a run that has ended once more, to upload what is missing. `UserError` if it fails."""
    check_reachable(config)
    try:
        return WandbSink(config, run, directory, "online")
    except wandb.Error as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"W&B cannot be reached ({reason}); try again when it can.") from None


def _environment() -> wandb.Settings:
    """wandb's settings, with those of the environment. `UserError` if those are wrong."""
    try:
        return wandb.setup(settings=wandb.Settings(silent=True)).settings
    except ValueError as error:  # pydantic's: line 2 names the setting, line 3 the error
        reason = " ".join(without_secrets(str(error)).split("\n")[1:3])
        raise UserError(
            f"the environment's WANDB_* variables: {reason}; fix or unset them."
        ) from None


def _choose_mode(config: TrackingConfig, environment_mode: str, server: str) -> tuple[Mode, str]:
    """The mode, and the reason if it is offline."""
    if config.mode == "offline":
        return "offline", "tracking.mode"
    if config.mode == "auto" and environment_mode != "online":
        return "offline", f"WANDB_MODE={environment_mode}"
    if not find_key():
        _check_key(config, server)
        return "offline", "no API key"
    if not _answers(server):
        scheme, found, rest = server.rpartition("://")
        address = scheme + found + rest.rpartition("@")[2]  # without a name and password
        return "offline", f"{address} does not answer"
    return "online", ""


def _answers(server: str) -> bool:
    """True if the server answers at all, directly or through the environment's proxy."""
    try:
        urllib.request.urlopen(server, timeout=PROBE_TIMEOUT).close()
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError, http.client.HTTPException):  # also a malformed address
        return False
    return True


def _open_run(config: TrackingConfig, run: RunIdentity, directory: Path, mode: Mode) -> Any:
    os.environ["WANDB_DATA_DIR"] = str(directory / "wandb")  # where tables are staged for sync
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
            reinit="create_new",  # the merge's run is opened while training's is open
            init_timeout=INIT_TIMEOUT,
            finish_timeout=FINISH_TIMEOUT,
            finish_timeout_raises=True,
            x_transaction_log_flush_interval=1,
            console="off",  # what a stage prints may contain anything
            disable_git=True,  # a remote's address may contain a token
            disable_code=True,
            x_disable_meta=without_secrets(sys.argv) != sys.argv,  # contains the command line
        ),
    )


@contextmanager
def _without_slurm_signal() -> Iterator[None]:
    """Keep SIGUSR1, Slurm's warning, from threads and processes started within: mask it."""
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


class WandbSink:
    """One W&B run.

    A separate thread speaks to wandb, so that a stage never waits for the network or for wandb.
    Whatever happens to wandb, the stage continues with its local log. A service that was ended (by
    SIGTERM to all processes of a Slurm task) is started again, and the run continued.
    """

    def __init__(
        self, config: TrackingConfig, run: RunIdentity, directory: Path, mode: Mode
    ) -> None:
        self._open = partial(_open_run, config, run, directory, mode)
        self._run_id, self._directory = run.run_id, directory
        self.run = self._open()
        self._journal = RowJournal(Path(self.run.settings.sync_dir))
        self.mode: str = mode
        self.url: str = (self.run.url or "") if mode == "online" else ""
        self._starting_step = self.run.starting_step if mode == "online" else None
        self._has_steps = False
        self._step: float | None = None  # of the newest row
        self._held = Held()  # rows that W&B already has and that will be logged again
        self._given = 0  # how many rows of the local log it has, unless the service lost some
        self._media: dict[str, tuple[float | None, Table | Image]] = {}  # the newest, with steps
        self._lost, self._finished = threading.Event(), False
        self._complaints: set[str] = set()
        self._calls: Queue[Callable[[], object] | None] = Queue()
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()
        _open_runs.add(run.run_id)

    def begin(self, kept: float | None) -> None:
        """Send the rows that W&B lacks of those that the local log keeps; it is cut already."""
        rows = read_log(self._directory).rows
        self._calls.put(lambda: self._begin(rows))

    def write(self, event: Event) -> None:
        """Hand an event to the thread that speaks to wandb."""
        self._calls.put(lambda: self._send(event))

    def finish(self, failed: bool) -> None:
        """Close the run within a bounded time, and print how to upload what was not uploaded."""
        self._calls.put(lambda: self._finish(failed))
        self._calls.put(None)
        self._thread.join(FINISH_TIMEOUT + FINISH_MARGIN)
        _open_runs.discard(self._run_id)
        if not self._finished:
            self._lost.set()
            if not _open_runs:
                kill_service()
        if left := not_uploaded(self._directory, self._run_id):
            offline = all(map(is_offline, left))
            what = (
                "logged offline; upload it" if offline else "not everything was uploaded; upload it"
            )
            say(f"W&B: {what} later with: {self._sync_command()}")

    def _finish(self, failed: bool) -> None:
        with suppress(TimeoutError):
            self.run.finish(exit_code=int(failed))
            self._finished = True
            if self.mode == "online":
                synced_marker(Path(self.run.settings.sync_dir)).touch()

    def _work(self) -> None:
        while call := self._calls.get():
            self._do(call)

    def _do(self, call: Callable[[], object]) -> None:
        if self._lost.is_set():
            return
        try:
            if service_has_ended():
                self._continue_run()
            try:
                call()
            except Exception as error:
                if self._lost.is_set():  # abandoned while it waited
                    return
                if not service_ends_soon():
                    self._complain(error)
                    return
                self._continue_run()
                call()
        except Exception as error:
            self._lost.set()
            reason = f"{type(error).__name__}: {error}"
            say(f"W&B: its service has ended ({reason}); from here on there is only the local log")
            say(f"W&B: upload the rest later with: {self._sync_command()}")

    def _sync_command(self) -> str:
        """What the user types, from here, to upload what W&B lacks."""
        path, here = self._directory, Path.cwd()
        path = path.relative_to(here) if path.is_relative_to(here) else path
        return f"cpt-merge sync {shlex.quote(str(path))}"

    def _complain(self, error: Exception) -> None:
        """Report something that was left out, once, without names of temporary files."""
        reason = isinstance(error, OSError) and error.strerror
        text = f"left something out ({reason or f'{type(error).__name__}: {error}'})"
        if text not in self._complaints:
            self._complaints.add(text)
            say(f"W&B: {text}; the local log has it")

    def _continue_run(self) -> None:
        """Open the run again, and send again what the service lost."""
        if service_has_ended():
            forget_service()
        repair(attempt_folders(self._directory, self._run_id)[-1])
        with _without_slurm_signal():
            self.run, self._has_steps = self._open(), False
        at_server = self.run.starting_step if self.mode == "online" else None
        arrived = held_rows(self._directory, self._run_id, at_server)
        self._journal = RowJournal(Path(self.run.settings.sync_dir))
        for row in read_log(self._directory).rows[: self._given]:
            if new := arrived.without(row):
                self._log(new)
        for name, (step, event) in self._media.items():
            if arrived.without(_at_step(step, {name: 0.0})):
                self._log(_at_step(step, {name: self._medium(event)}))

    def _begin(self, rows: Sequence[Row]) -> None:
        self._held = held_rows(self._directory, self._run_id, self._starting_step)
        for row in rows:
            self._log_new(row)

    def _send(self, event: Event) -> None:
        match event:
            case Scalars(row):
                self._log_new(row)
            case Curves(rows=[]):
                pass  # wandb makes no chart of nothing
            case Table(name) | Image(name):
                self._log(_at_step(self._step, {name: self._medium(event)}))
                self._media[name] = self._step, event
            case File():
                path, base = stored(self._directory, event), self._directory / "files"
                self.run.save(str(path), base_path=str(base), policy="now")
            case Summary(values):
                self.run.summary.update(dict(values))
            case Alert(title, text):
                self.run.alert(title, text)
            case Artifact():
                log_artifact(self.run, event)

    def _log_new(self, row: Row) -> None:
        self._step = row.get(STEP, self._step)
        if new := self._held.without(row):
            self._log(new)
        self._given += 1

    def _log(self, row: Mapping[str, Any]) -> None:
        if STEP in row and not self._has_steps:
            # only in runs with steps: in others every chart would wait for its axis
            self.run.define_metric(STEP)
            self.run.define_metric(TOKENS)
            self.run.define_metric("*", step_metric=STEP, step_sync=False)
            self._has_steps = True
        self._journal.write(self.run.step, row_key(row))
        self.run.log(dict(row))

    def _medium(self, event: Table | Image) -> Any:
        """wandb's form of a table, chart (which the workspace displays by itself) or picture."""
        if isinstance(event, Image):
            return wandb.Image(str(stored(self._directory, event)))
        if not isinstance(event, Curves):
            return wandb.Table(list(event.columns), event.rows, allow_mixed_types=True)
        lines: dict[Cell, tuple[list[Cell], list[Cell]]] = {}
        for curve, x, y in event.rows:
            xs, ys = lines.setdefault(curve, ([], []))
            xs.append(x)
            ys.append(y)
        return wandb.plot.line_series(
            [xs for xs, _ in lines.values()],
            [ys for _, ys in lines.values()],
            keys=[str(curve) for curve in lines],
            title=event.name,
            xname=event.columns[1],
        )


def _at_step(step: float | None, row: dict[str, Any]) -> dict[str, Any]:
    return row if step is None else {**row, STEP: step}
