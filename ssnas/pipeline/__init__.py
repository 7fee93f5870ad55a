"""What each stage of the pipeline does, given a run's parameters.

A module has the name of its stage and reads and writes the files of `artifacts.Places`. The scripts
in stages/, the command `ssnas` and `ssnas.fit` all call these functions, and nothing else, so that
the same parameters give the same weights.
"""
