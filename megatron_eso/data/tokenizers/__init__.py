"""Tokenizers: one class for SentencePiece models and Hugging Face files."""
