"""What `experiments.benchmark` can time, by name.

A suite is a module of this package with `cases(tiny) -> Iterable[Case]`, see
`experiments.suites.timing`, and maybe `notes(tiny) -> str`, what its report
says beside the times.
"""

NAMES = ("falcon_h1", "hydra", "scan", "attention", "mhs_vm")
