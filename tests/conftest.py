"""Test-wide settings: eight CPU devices, so that every mesh can be built.

Most of a test's time is compilation, so the compiler optimises as little as it
can; `make parity` and `make test-gpu` run what users run.
"""

import os

for _name, _value in (
  ("xla_force_host_platform_device_count", 8),
  ("xla_backend_optimization_level", 0),
):
  if _name not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = " ".join(
      [os.environ.get("XLA_FLAGS", ""), f"--{_name}={_value}"]
    ).strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if os.environ["JAX_PLATFORMS"] == "cpu":
  # Read where triton is first imported: its own library is interpreted too.
  os.environ.setdefault("TRITON_INTERPRET", "1")
