"""The parts of a self-supervised pretraining engine: backbone, views, heads, text, objectives, health, export."""

__version__ = "0.1.0"
