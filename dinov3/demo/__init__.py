"""The demo: train a small ViT on real images on the CPU, measure what it has learnt, and draw its features."""

from __future__ import annotations

from dinov3.demo.run import DemoOptions, DemoResults, run_demo

__all__ = ["DemoOptions", "DemoResults", "run_demo"]
