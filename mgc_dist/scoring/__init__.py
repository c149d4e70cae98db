"""A model and a split to figures, with intervals and comparisons."""
