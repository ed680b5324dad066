"""Scripts, run from the repository as `python -m experiments.NAME`."""
