"""The stages of the check, the most valuable first."""

from __future__ import annotations

from benchmarks.gpu_check import measured, runs
from benchmarks.gpu_check.check import Entry

STAGES: dict[str, Entry] = {
    "ceilings": Entry(run=measured.ceilings, limit=30, about="The device, its copy rate and its rate of products"),
    "tests": Entry(run=runs.tests, limit=110, about="The tests marked gpu"),
    "sampling": Entry(run=measured.sampling, limit=130, about="Sampling, as shares of the measured ceilings"),
    "training": Entry(run=measured.training, limit=80, about="Training steps, as shares of the rate of products"),
    "resblock": Entry(run=runs.resblock, limit=80, about="16-resblock against bf16-mixed over 200 updates"),
    "memory": Entry(run=measured.memory, limit=50, about="Peaks of memory against the prediction of dalle-zoo plan"),
    "fsdp": Entry(run=runs.fsdp, limit=50, about="fsdp2 on one rank against an unsharded network"),
    "evaluation": Entry(run=measured.evaluation, limit=50, about="Features for FID"),
    "compile": Entry(run=measured.compiled, limit=90, about="Compiled blocks and networks against eager ones"),
    "dvae": Entry(run=measured.dvae, limit=40, about="Encoding and decoding images"),
}
"""Stages by name. The limits add up to more than a run has; what a stage leaves is for those after it."""
