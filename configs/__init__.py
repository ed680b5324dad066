"""Configs, one file per system: `--config=configs/NAME.py:VARIANT`."""
