"""The local log: what a stage logged, as plain files that need neither a network nor wandb to be read.

    run.json         who logged: stage, run name, group, run id, settings, carrier, start time
    metrics.jsonl    one row per call: {"time": Unix seconds, "train/step": 10, "train/loss": 2.1}; NaN as NaN
    tables/NAME.json {"columns": [...], "rows": [[...], ...]}
    images/NAME.png  a copy of each figure, so that the log can be moved
    summary.json     final values
    alerts.jsonl     {"time", "title", "text"}
    artifacts.json   what the stage used and what it leaves: {"artifacts": [{"name", "kind", "uri", "digest", "used"}]}
    files/NAME       a copy of each small file

Every row is in the file system's hands when `log` returns, so that a killed process loses none.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cpt_merge.core.artifact import write_json, write_text
from cpt_merge.core.errors import UserError
from cpt_merge.tracking.config import TrackingConfig

STEP = "train/step"  # the x axis of everything that is logged with a step
SYSTEM = "system"  # the job type of a node's run
TOKENS = "train/tokens"  # the other axis; in every row that holds training's numbers
Cell = str | int | float | bool | None
Row = dict[str, float]
RowKey = tuple[float | None, frozenset[str]]


def row_key(row: Mapping[str, float]) -> RowKey:
    """A row's step, and the names of its metrics."""
    return row.get(STEP), frozenset(row) - {"time", STEP}


@dataclass(frozen=True)
class RunIdentity:
    """Under which names a stage logs."""

    stage: str
    run_name: str
    group: str
    run_id: str
    settings: dict[str, Any]  # the resolved recipe and what else makes the run what it is

    def of_node(self, host: str) -> RunIdentity:
        """The run of the same stage that holds nothing but what W&B measures of a node."""
        return RunIdentity(
            SYSTEM, f"{self.run_name}-{host}", self.group, f"{self.run_id}-{host}", {}
        )


@dataclass(frozen=True)
class Artifact:
    """A directory or file that a stage used or leaves, told apart from others of its name by its digest."""

    name: str
    kind: str  # text, tokenizer, model or store
    uri: str  # file://... or https://...
    digest: str
    used: bool


@dataclass(frozen=True)
class Table:
    """Columns and rows of scalars."""

    columns: list[str]
    rows: list[list[Cell]]


@dataclass(frozen=True)
class StageLog:
    """What a local log holds."""

    run: dict[str, Any] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    tables: dict[str, Table] = field(default_factory=dict)
    images: dict[str, Path] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    alerts: list[dict[str, Any]] = field(default_factory=list)
    artifacts: list[Artifact] = field(default_factory=list)
    files: dict[str, Path] = field(default_factory=dict)  # by the whole name, with its ending

    def series(self, metric: str, by: str = STEP) -> list[tuple[float, float]]:
        """(x, value) of every row that holds both `metric` and `by`, in the order logged."""
        return [(row[by], row[metric]) for row in self.rows if metric in row and by in row]


class LocalLog:
    """Writes the log of one stage into `directory`."""

    def __init__(self, directory: Path, run: RunIdentity) -> None:
        self.directory = directory
        self.run = run

    def open(self, config: TrackingConfig, carrier: str, url: str) -> None:
        """Write `run.json`; `carrier` is the W&B mode, or none, `url` where W&B shows the run, if it does."""
        tracking = config.model_dump(mode="json")
        values = {
            **asdict(self.run),
            "tracking": tracking,
            "carrier": carrier,
            "url": url,
            "started": time.time(),
        }
        write_json(self.directory / "run.json", values)

    def keep_until(self, step: float | None) -> list[Row]:
        """Cut off what an earlier attempt logged after `step` (None: everything), and return the rows that are left.

        The cut is at the first row of a later step: rows are in the order of time, so the rows without a step that
        follow it belong to what will be done again.
        """
        rows = _read_lines(self.directory / "metrics.jsonl")
        if step is None:
            keep = 0
            for name in ("tables", "images", "files"):
                shutil.rmtree(self.directory / name, ignore_errors=True)
            for name in ("summary.json", "alerts.jsonl"):
                (self.directory / name).unlink(missing_ok=True)
        else:
            keep = next(
                (place for place, row in enumerate(rows) if row.get(STEP, 0) > step), len(rows)
            )
            alerts = _read_lines(
                self.directory / "alerts.jsonl"
            )  # without a last line that a kill cut short
            write_text(self.directory / "alerts.jsonl", "".join(map(_line, alerts)))
        write_text(self.directory / "metrics.jsonl", "".join(map(_line, rows[:keep])))
        return rows[:keep]

    def log(self, row: Mapping[str, float]) -> None:
        """Append one row."""
        self._append("metrics.jsonl", {"time": round(time.time(), 3), **row})

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
        """Write a table; one of the same name is replaced."""
        write_json(
            self.directory / "tables" / f"{name}.json",
            {"columns": list(columns), "rows": [*map(list, rows)]},
        )

    def image(self, name: str, path: Path) -> Path:
        """Copy a figure into the log. Returns the copy."""
        target = self.directory / "images" / f"{name}{path.suffix}"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
        return target

    def file(self, name: str, path: Path) -> Path:
        """Copy a small file into the log. Returns the copy."""
        target = self.directory / "files" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
        return target

    def artifact(self, artifact: Artifact) -> None:
        """Add what was used or is left; of the same name only the newest stays."""
        known = _read_artifacts(self.directory)
        others = [
            one for one in known if (one["name"], one["used"]) != (artifact.name, artifact.used)
        ]
        write_json(self.directory / "artifacts.json", {"artifacts": [*others, asdict(artifact)]})

    def summary(self, values: Mapping[str, Any]) -> None:
        """Add to the final values."""
        write_json(
            self.directory / "summary.json",
            {**(_read_json(self.directory / "summary.json") or {}), **values},
        )

    def alert(self, title: str, text: str) -> None:
        """Append an alert."""
        self._append("alerts.jsonl", {"time": round(time.time(), 3), "title": title, "text": text})

    def _append(self, name: str, row: Mapping[str, Any]) -> None:
        with open(self.directory / name, "a", encoding="utf-8") as file:
            file.write(_line(row))


def read_run(directory: Path) -> dict[str, Any]:
    """Who logged into `directory`: what `run.json` holds, empty where nothing was logged."""
    return _read_json(directory / "run.json") or {}


def read_log(directory: Path) -> StageLog:
    """What a stage logged into `directory` so far; empty where nothing is. A half-written last row is left out."""
    return StageLog(
        run=read_run(directory),
        rows=_read_lines(directory / "metrics.jsonl"),
        tables={
            name: Table(**(_read_json(path) or {})) for name, path in _files(directory / "tables")
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
        raise UserError(f"the log {path} is damaged ({error}); mend or remove the file.") from None
    return values
