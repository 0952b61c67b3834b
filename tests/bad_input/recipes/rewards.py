"""A reward that recipes beside it name."""


def score(completions: list[str], **columns: object) -> list[float]:
    """0 for each."""
    return [0.0 for _ in completions]
