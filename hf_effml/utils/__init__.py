"""Helpers without a subject: optional imports, the state of the environment, measuring, plotting, image data."""
