"""Stands for the stages of posttrain in the processes of a soak."""
