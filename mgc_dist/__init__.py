"""Distributed training of music genre classifiers that learn more than the shortcut.

Words: a *track* is one audio file, a *segment* a window of a track, a *row* the number of
a segment in the data set, a *shard* one tar file of segments. The *main model* is trained
and predicts; the *bias model* is weak and frozen, and only its logits enter the loss.

Shapes, used in every docstring of this package:
    B  segments in a batch          T  audio samples of a segment (48,000 for 3 s)
    F  frames of a backbone         D  hidden size
    K  genres                       S  segments of a track (19 for 30 s)
    N  rows of the data set         n  rows of the training split
"""

__version__ = "0.1.0"
