"""Tokens by sample number: shards, their copies, tokenizers and order. It knows no noise."""
