"""Rollouts: samplers that continue prompts, and rewards that score what they wrote."""
