def score(completions, **columns:
