"""Text to datasets of token shards, resumably and in parallel."""
