"""Scans and their labels: finding, pairing, splitting and checking them, and the data sets made of them.

Nothing here knows a network or what a run writes.
"""
