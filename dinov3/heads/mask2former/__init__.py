"""Segmentation by mask classification on a frozen ViT: ViT-Adapter (arXiv 2205.08534), Mask2Former (2112.01527)."""
