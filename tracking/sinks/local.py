"""The local log: what a stage logged, as plain files that can be read without wandb.

    run.json         stage, run name, group, run id, settings, W&B mode and address, start time
    metrics.jsonl    one row per call: {"time": Unix seconds, "train/step": 10, "train/loss": 2.1}
    tables/NAME.json {"columns": [...], "rows": [[...], ...]}
    images/NAME.png  a copy of each picture, so that the log can be moved
    summary.json     final values
    alerts.jsonl     {"time", "title", "text"}
    artifacts.json   used and made: {"artifacts": [{"name", "kind", "uri", "digest", "used"}]}
    files/NAME       a copy of each small file

Every row is handed to the file system before `write` returns, so that a killed process loses none.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from cpt_merge.core.artifact import write_json, write_text
from cpt_merge.core.errors import UserError
from cpt_merge.tracking.config import TrackingConfig
from cpt_merge.tracking.events import (
    STEP,
    Alert,
    Artifact,
    Cell,
    Event,
    File,
    Image,
    Row,
    Scalars,
    Summary,
    Table,
)


@dataclass(frozen=True)
class RunIdentity:
    """Under which names a stage logs."""

    stage: str
    run_name: str
    group: str
    run_id: str
    settings: dict[str, Any]  # the resolved recipe and what else determines the run


@dataclass(frozen=True)
class StageLog:
    """The content of a local log."""

    run: dict[str, Any] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    tables: dict[str, Table] = field(default_factory=dict)
    images: dict[str, Path] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    alerts: list[dict[str, Any]] = field(default_factory=list)
    artifacts: list[Artifact] = field(default_factory=list)
    files: dict[str, Path] = field(default_factory=dict)  # by the whole name, with its extension

    def series(self, metric: str, by: str = STEP) -> list[tuple[float, float]]:
        """(x, value) of every row that has both `metric` and `by`, in the order logged."""
        return [(row[by], row[metric]) for row in self.rows if metric in row and by in row]

    def records(self, table: str) -> list[dict[str, Cell]]:
        """The rows of a table as dictionaries by column; none if it was not logged."""
        return self.tables[table].records if table in self.tables else []

    @cached_property
    def newest(self) -> dict[str, float]:
        """The newest value of every metric."""
        values: dict[str, float] = {}
        for row in self.rows:
            values.update(row)
        values.pop("time", None)
        return values

    @property
    def metrics(self) -> list[str]:
        """The names of all metrics, in the order of their first rows."""
        return list(self.newest)


class LocalLog:
    """The sink that writes one stage's log into `directory`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def open(self, run: RunIdentity, config: TrackingConfig, mode: str, url: str) -> None:
        """Write `run.json`; `mode` is W&B's, and `url` its page of the run, if it has one."""
        values = {
            **asdict(run),
            "tracking": config.model_dump(mode="json"),
            "mode": mode,
            "url": url,
            "started": time.time(),
        }
        write_json(self.directory / "run.json", values)

    def begin(self, kept: float | None) -> None:
        """Cut off what an earlier attempt logged after step `kept` (None: all of it).

        The cut is at the first row of a later step: rows are in the order of time, so rows without
        a step that follow it belong to what will be repeated.
        """
        metrics, alerts = self.directory / "metrics.jsonl", self.directory / "alerts.jsonl"
        rows: list[Row] = []
        if kept is None:
            for name in ("tables", "images", "files"):
                shutil.rmtree(self.directory / name, ignore_errors=True)
            (self.directory / "summary.json").unlink(missing_ok=True)
            alerts.unlink(missing_ok=True)
        else:
            rows = _read_lines(metrics)
            later = (place for place, row in enumerate(rows) if row.get(STEP, 0) > kept)
            rows = rows[: next(later, len(rows))]
            # written anew without a last line that a kill cut short
            write_text(alerts, "".join(map(_line, _read_lines(alerts))))
        write_text(metrics, "".join(map(_line, rows)))

    def write(self, event: Event) -> None:
        """Write one event to its file."""
        match event:
            case Scalars(values):
                self._append("metrics.jsonl", values)
            case Table(name, columns, rows):
                content = {"columns": columns, "rows": rows}
                write_json(self.directory / "tables" / f"{name}.json", content)
            case Image() | File():
                copy = stored(self.directory, event)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(event.path, copy)
            case Summary(values):
                path = self.directory / "summary.json"
                write_json(path, {**(_read_json(path) or {}), **values})
            case Alert(title, text):
                self._append("alerts.jsonl", {"title": title, "text": text})
            case Artifact(name, used=used):  # only the newest of a name stays
                known = _read_artifacts(self.directory)
                others = [one for one in known if (one["name"], one["used"]) != (name, used)]
                write_json(
                    self.directory / "artifacts.json", {"artifacts": [*others, asdict(event)]}
                )

    def finish(self, failed: bool) -> None:
        """Nothing to do: everything is written already."""

    def _append(self, name: str, values: Mapping[str, Any]) -> None:
        with open(self.directory / name, "a", encoding="utf-8") as file:
            file.write(_line({"time": round(time.time(), 3), **values}))


def stored(directory: Path, event: Image | File) -> Path:
    """Where the local log in `directory` keeps its copy of a file."""
    if isinstance(event, File):
        return directory / "files" / event.name
    return directory / "images" / f"{event.name}{event.path.suffix}"


def read_run(directory: Path) -> dict[str, Any]:
    """Who logged into `directory`: what `run.json` holds, empty where nothing was logged."""
    return _read_json(directory / "run.json") or {}


def read_log(directory: Path) -> StageLog:
    """What a stage logged into `directory` so far; empty where nothing is.

    A half-written last row is left out.
    """
    return StageLog(
        run=read_run(directory),
        rows=_read_lines(directory / "metrics.jsonl"),
        tables={
            name: Table(name, **(_read_json(path) or {}))
            for name, path in _files(directory / "tables")
        },
        images=dict(_files(directory / "images")),
        summary=_read_json(directory / "summary.json") or {},
        alerts=_read_lines(directory / "alerts.jsonl"),
        artifacts=[Artifact(**one) for one in _read_artifacts(directory)],
        files={
            path.relative_to(directory / "files").as_posix(): path
            for _, path in _files(directory / "files")
        },
    )


def _files(folder: Path) -> list[tuple[str, Path]]:
    """(name as logged, path) of every table or image."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".tmp")
    return [(path.relative_to(folder).with_suffix("").as_posix(), path) for path in files]


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _read_artifacts(directory: Path) -> list[dict[str, Any]]:
    return list((_read_json(directory / "artifacts.json") or {}).get("artifacts", []))


def _read_json(path: Path) -> dict[str, Any] | None:
    return (
        _parse(path, path.read_text(encoding="utf-8", errors="replace")) if path.is_file() else None
    )


def _read_lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    # a line without its end was cut off by a kill
    whole = path.read_text(encoding="utf-8", errors="replace").rpartition("\n")[0]
    return [_parse(path, line) for line in whole.split("\n") if line]


def _parse(path: Path, text: str) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads(text)
    except ValueError as error:
        raise UserError(f"the log {path} is damaged ({error}); fix or remove the file.") from None
    return values
