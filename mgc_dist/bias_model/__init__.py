"""Frozen models: states of every row; the bias model's heads and table; heads that probe."""
