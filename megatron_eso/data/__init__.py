"""Tokens by sample number: shards, their copies, tokenizers and order; no noise."""
