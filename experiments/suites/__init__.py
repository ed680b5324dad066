"""What `experiments.benchmark` can time, by name.

A suite is a module of this package with `cases(tiny) -> Iterable[Case]`, see
`experiments.suites.timing`, and maybe `notes(tiny) -> str`, what its report
says beside the times; `figures(results, prefix)`, which draws images and
returns the path and caption of each; and `TUNING`, the module of a suite for
`--tune`, with `write(results, folder) -> str`.
"""

NAMES = ("falcon_h1", "hydra", "scan", "attention", "mhs_vm")
