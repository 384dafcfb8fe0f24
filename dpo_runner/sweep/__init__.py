"""Sweeps of many runs: axes -> points -> a directory with a job for each -> worker processes -> states."""
