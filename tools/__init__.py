"""Everything that several bundles need, sorted into rooms; what only one bundle needs lies in that bundle.

Imports go downwards: commands → training, results, samples, shipping → data, weights → common, losses.
"""
