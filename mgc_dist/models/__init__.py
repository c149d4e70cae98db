"""The only wing that knows transformers: main models, bias backbones, their folders and FLOPs."""
