"""Where every number of a run goes: a local log that is always written, and Weights & Biases when asked for."""

from tracking.config import TrackingConfig
from tracking.local import Cell, StageLog, read_log
from tracking.tracker import Tracker, start_tracker

__all__ = ["Cell", "StageLog", "Tracker", "TrackingConfig", "read_log", "start_tracker"]
