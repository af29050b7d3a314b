"""What training takes, by arithmetic alone: memory, operations, bytes on the wire, time.

`recipe` reads the keys of a recipe into a `Work` (what the stage asks for: `prior`, `dvae`) and a `Setup` (GPUs,
strategy, precision, batch). `memory`, `network` and `duration` answer, `suggestions` searches for what would fit,
`plan` puts the answers together and `report` prints them. Formulas and assumptions: ``docs/planning.md``.
"""
