"""A sink that keeps every event: `tracker = Tracker([recording := Recording()])`."""

from cpt_merge.tracking import STEP
from cpt_merge.tracking.events import Event, File, Image, Scalars, Table


class Recording:
    def __init__(self) -> None:
        self.events: list[Event] = []

    def begin(self, kept: float | None) -> None: ...

    def write(self, event: Event) -> None:
        if isinstance(event, Image | File):
            assert event.path.is_file()
        if isinstance(event, Table):
            assert all(len(row) == len(event.columns) for row in event.rows)
        self.events.append(event)

    def finish(self, failed: bool) -> None: ...

    @property
    def rows(self) -> list[tuple[float | None, dict[str, float]]]:
        """(step, metrics) of every row."""
        rows = [dict(event.values) for event in self.events if isinstance(event, Scalars)]
        return [(row.pop(STEP, None), row) for row in rows]

    @property
    def tables(self) -> dict[str, list[dict[str, object]]]:
        """The rows of every table and chart, by its name, as dictionaries."""
        tables = [event for event in self.events if isinstance(event, Table)]
        return {
            table.name: [dict(zip(table.columns, row, strict=True)) for row in table.rows]
            for table in tables
        }

    @property
    def names(self) -> set[str]:
        """The names of tables, charts, pictures and files."""
        return {event.name for event in self.events if isinstance(event, Table | Image | File)}
