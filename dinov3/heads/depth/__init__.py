"""Depth heads and whole depth models."""
