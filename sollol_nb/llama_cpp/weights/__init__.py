"""Weights: how the tensors of a model reach the workers only once.

* `cache.py`: the files in which the workers of this machine keep tensors: verified, bounded, removed
"""
