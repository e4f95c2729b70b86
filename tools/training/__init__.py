"""What a training run needs beside MONAI's engines: checks before it starts, handlers, mixed precision.

What is made of a prediction (label maps, metrics of cases, pictures) lies in `results`.
"""
