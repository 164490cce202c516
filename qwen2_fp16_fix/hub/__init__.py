"""Exports a checkpoint with the fix as remote code, and pushes it to the Hub."""
