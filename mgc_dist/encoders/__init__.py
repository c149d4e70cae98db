"""Pretrained encoders: where they come from, and an adapter for each kind."""
