"""Checkpoints: reading them, filling a network from pre-training, and export.

Nothing here reads a scan or trains.
"""
