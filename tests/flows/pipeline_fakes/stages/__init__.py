"""Stands in for the real `stages` in the stage processes of the pipeline's tests."""
