"""Damaged input of four kinds, each made by its number alone: configs, weights, jsons and models.

What is promised for every one of them: a command ends with an exit code from 0 to 3, and where it refuses, with one
sentence; within 25 seconds, in 2 GB; and nothing that `certify` calls proven gives a number that is not finite.

    python -m tests.fuzz                      # all of them, in full
    python -m tests.fuzz configs              # one kind
    python -m tests.fuzz configs 1200 1300    # some of them
    python -m tests.fuzz configs 1234         # one, in this process: prints what was run, and its traceback
"""
