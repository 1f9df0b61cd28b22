"""Where every number of a run goes: a local log that is always written, and Weights & Biases when asked for."""

from tracking.config import TrackingConfig
from tracking.tracker import Tracker, start_tracker

__all__ = ["Tracker", "TrackingConfig", "start_tracker"]
