"""What dino.txt can do with words: zero-shot classification and open-vocabulary segmentation (arXiv 2412.16334)."""
