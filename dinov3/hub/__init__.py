"""Pretrained models: which architecture, which weights, and how they are loaded."""
