"""Rollouts of several turns: tools and environments answer the model, over any sampler of token ids."""
