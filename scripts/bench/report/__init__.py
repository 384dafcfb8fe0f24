"""The record of measurements and the Markdown report built from it."""
