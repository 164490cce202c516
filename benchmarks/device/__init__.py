"""One command that proves the fix on one device and times it: `python -m benchmarks gpu`."""
