"""Estimates the memory, operations, network traffic and time of training without running it.

`recipe` reads the keys of a recipe into a `Workload` (a stage: `prior`, `dvae`) and a `Setup` (GPUs, strategy,
precision, batch). `memory`, `collectives` and `duration` compute the estimates, `suggestions` searches for changes
that fit, `plan` combines the results and `report` prints them. Formulas and assumptions: ``docs/design/planning.md``.
"""
