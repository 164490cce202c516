"""Importing this module registers the fix: for harnesses where one line is all that can be added."""

from .registration.register import register

register()
