"""Small helpers that know nothing of scans or networks: text, errors, files, tables, cards of weights, the config
that is being run.

Nothing here imports another room.
"""
