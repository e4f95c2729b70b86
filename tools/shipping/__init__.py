"""A bundle on its way to its users: release, verification, installation, MONAI Label.

Nothing here looks into scans.
"""
