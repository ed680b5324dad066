"""The studies of `experiments.hydra`."""
