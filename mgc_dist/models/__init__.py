"""Main models and bias backbones: how they are built, what they cost, where they are kept."""
