"""Synthetic CT and MR volumes, to try every bundle without downloading a data set.

Nothing here reads a real scan.
"""
