"""What is made of a network's output: label maps, evaluation, pictures.

Nothing here changes weights.
"""
