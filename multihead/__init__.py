"""Multi-head systems in JAX and Flax: mechanisms, kernels, training."""

__version__ = "0.1.0"
