"""Where every number of a run goes: a local log that is always written, and Weights & Biases when asked for."""

from cpt_merge.tracking.config import TrackingConfig
from cpt_merge.tracking.sinks.local import Cell, StageLog, read_log
from cpt_merge.tracking.tracker import Tracker, start_tracker

__all__ = ["Cell", "StageLog", "Tracker", "TrackingConfig", "read_log", "start_tracker"]
