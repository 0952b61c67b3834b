"""What `evaluate` and `sample` share: rows, answers and their scores, resumable shards, intervals."""
