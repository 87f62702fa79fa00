"""posttrain: take a trained model as it is, find the labels that bend its boundary, remove them, refine."""

__version__ = "0.1.0"
