"""Measuring Vims on images: accuracy, work and latency as one report, and pictures. No saved folder carries it."""
