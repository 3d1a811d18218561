"""Times, masks and slot orders of samples."""
