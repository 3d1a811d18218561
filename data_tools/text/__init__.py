"""Input text: file formats, and the documents in them."""
