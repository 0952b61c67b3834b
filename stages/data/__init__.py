"""Datasets: types, folders, ledgers, chat templates, masks, token ids. Imports no heavy library by itself."""

from stages.data.dataset import merge, read_dataset, write_dataset
from stages.data.ledger import RowLedger
from stages.data.pairs import TokenizedPair, tokenize_pairs
from stages.data.tokenize import TokenizedPrompt, TokenizedSequence, tokenize_prompts, tokenize_sequences
from stages.data.types import Dataset, required_columns, text_columns

__all__ = [
    "Dataset",
    "RowLedger",
    "TokenizedPair",
    "TokenizedPrompt",
    "TokenizedSequence",
    "merge",
    "read_dataset",
    "required_columns",
    "text_columns",
    "tokenize_pairs",
    "tokenize_prompts",
    "tokenize_sequences",
    "write_dataset",
]
