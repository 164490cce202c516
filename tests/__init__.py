"""A package, so that no other folder named `tests` among the installed packages takes its name."""
