"""The numbers that flow through a running model."""
