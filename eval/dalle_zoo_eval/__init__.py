"""Evaluation of dalle-zoo models: pure metrics, an independent network, and one module a protocol.

| module | what it holds |
|---|---|
| `metrics` | functions of tensors: PSNR, codebook use, bits per token, retrieval, concept accuracy |
| `evaluator` | a small ImageNet network that neither drew nor ranked a picture |
| `emoji64` | the protocol of the model in the box |
| `sheets` | pictures with their captions below |
| `command` | ``dalle-zoo eval`` |
"""
