"""Names of what lies in a model folder."""

from __future__ import annotations

INDEX = "model_index.json"
"""Names the parts; a folder with it is a complete model."""
RECORD = "record.json"
"""What is known of the model: description, license, data, sizes."""
CONVERSION = "conversion.json"
"""Which files of another code base it was made of; a folder with it can be made again, and may be replaced."""
COMPONENTS = ("dvae", "prior", "tokenizer", "ranker")
"""The parts, each in a folder of its name; the first three make a pipeline."""
