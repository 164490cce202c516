"""The files and folders that a user names: read within limits, and written whole or not at all."""
