"""Tracking of studies and trials. Light to import: the service itself is in tracking.mlflow_tracker."""

from tracking.journal import Journal, end_dead_trials, load_study_info, save_study_info
from tracking.sender import Sender
from tracking.tracker import MetricRow, ModelInfo, NullTracker, RefusedError, StudyInfo, Tracker

__all__ = [
    "Journal",
    "MetricRow",
    "ModelInfo",
    "NullTracker",
    "RefusedError",
    "Sender",
    "StudyInfo",
    "Tracker",
    "end_dead_trials",
    "load_study_info",
    "save_study_info",
]
