"""Plain-DETR on a frozen ViT (arXiv 2508.10104, section 6.3.1; arXiv 2308.01904): objects as classes and boxes."""
