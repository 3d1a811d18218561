"""The curves of a run, their tags and files, and the log."""
