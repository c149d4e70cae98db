"""What a data set is, in which order its rows come, and how they are read."""
