"""Modules that sit on a backbone: what a released checkpoint of a task can fill. No data, no training."""
