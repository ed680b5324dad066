"""The studies of `experiments.icl_gd`."""
