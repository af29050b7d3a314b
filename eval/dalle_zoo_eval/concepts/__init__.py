"""Protocols of kind ``concepts``: what a model does on things seen and unseen. ``emoji64`` is one.

Captioned images lie in splits, and a key ``<concept>_<style>`` tells what an image shows. A network that neither
generated nor ranked looks for the concept in what was sampled.

| module | what it holds |
|---|---|
| `protocol` | what fixes the numbers besides the model |
| `splits` | samples of a split, sampled by seed |
| `sampling` | codes of all candidates, chunk by chunk on disk, shared over processes |
| `figures` | everything that is measured of a split, and what the model was to reach |
| `evaluate` | a model to result file, sheets and report |
| `report` | a result file to tables and figures |
"""
