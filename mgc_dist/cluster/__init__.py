"""Where ranks run: who they are, how they meet, and what goes wrong on a cluster."""
