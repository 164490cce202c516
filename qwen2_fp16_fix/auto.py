"""Importing this module registers the fix, for programs to which only an import can be added."""

from .registration.register import register

register()
