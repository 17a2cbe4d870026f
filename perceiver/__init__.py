"""Perceiver, Perceiver IO and Perceiver AR in plain PyTorch."""
