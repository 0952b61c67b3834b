import broken


def score(prompts, completions):
    return [broken.one] * len(prompts)
