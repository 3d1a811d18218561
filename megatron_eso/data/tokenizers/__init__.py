"""Tokenizers: SentencePiece and Hugging Face files behind one class."""
