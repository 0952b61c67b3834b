"""Losses as pure functions of tensors: per-item values out, nothing averaged; they import torch and nothing
else.
"""
