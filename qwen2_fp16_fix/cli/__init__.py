"""The command line: options, what a terminal prints, exit codes."""
