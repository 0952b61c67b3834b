"""Stands in for the real `stages` in processes that resist being ended."""
