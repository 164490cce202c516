"""Importing this module registers the fix, for programs to which only an import can be added."""

from . import register

register()
