"""What `experiments.benchmark` can time, by name.

A suite is a module of this package with `cases(tiny) -> Iterable[Case]`; see
`experiments.suites.timing`.
"""

NAMES = ("falcon_h1", "hydra", "scan", "attention")
