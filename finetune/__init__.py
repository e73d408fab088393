"""Evaluation: one verb a protocol, one results.json each, intervals over patients."""
