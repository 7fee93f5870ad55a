"""The tables and figures of the papers, made from the runs of their systems."""
