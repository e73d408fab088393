"""The pretraining assembly: one loop, read top to bottom, and its recipes."""
