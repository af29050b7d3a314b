"""Everything that should be known about dalle-zoo on a GPU, in one command of a few minutes: ``make gpu-check``."""
