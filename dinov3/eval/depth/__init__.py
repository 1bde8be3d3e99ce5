"""Depth estimation: linear and DPT heads trained, evaluated and used for prediction (arXiv 2508.10104, section 6)."""
