"""Benchmarks that are run by other code: images in their layouts, and their result files in our reports.

| module | content |
|---|---|
| `layouts` | GenEval 2, T2I-CompBench, and the manifest of EvalScope |
| `imports` | their result files as result files of `dalle_zoo.results` |
| `command` | ``dalle-zoo benchmark`` |
"""
