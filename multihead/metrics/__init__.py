"""Metrics, one file per family of task: update, merge, compute."""
