"""Serving: an engine that runs the requests of many clients with one model."""
