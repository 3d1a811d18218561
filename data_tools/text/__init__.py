"""Reads input text: file formats, and the documents in them."""
