"""Where a run's numbers go: a local log that is always written, and Weights & Biases on request."""

from cpt_merge.tracking.config import TrackingConfig
from cpt_merge.tracking.events import STEP, Artifact, Cell, Table
from cpt_merge.tracking.sinks.local import StageLog, read_log
from cpt_merge.tracking.tracker import Tracker, start_tracker

__all__ = [
    "STEP",
    "Artifact",
    "Cell",
    "StageLog",
    "Table",
    "Tracker",
    "TrackingConfig",
    "read_log",
    "start_tracker",
]
