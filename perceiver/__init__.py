"""Perceiver, Perceiver IO and Perceiver AR in plain PyTorch."""

__version__ = "0.1.0"
