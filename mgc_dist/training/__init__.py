"""The loop, the losses, DeepSpeed around the main model, and checkpoints."""
