"""Tracks to shards: splits, segments, archives, and synthetic music."""
