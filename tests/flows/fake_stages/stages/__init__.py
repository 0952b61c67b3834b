"""Stands in for the real `stages` in the processes that the launcher's tests start."""
