"""Code that several bundles share, grouped by topic; code of a single bundle is in that bundle.

Imports go downwards: commands → training, results, samples, shipping → data, weights → common, losses.
"""
