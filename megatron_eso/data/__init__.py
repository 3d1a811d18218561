"""Tokens by sample number: shards, their copies, tokenizers, order. Nothing of noise."""
