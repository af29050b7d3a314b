"""The `dalle-zoo` command: one file for a group of sub-commands."""
