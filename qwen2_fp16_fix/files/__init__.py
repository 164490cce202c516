"""The files and folders that a user names: read within limits, and written completely or not at all."""
