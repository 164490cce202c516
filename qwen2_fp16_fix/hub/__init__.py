"""A checkpoint with the fix as remote code: a folder, and its way to the Hub."""
