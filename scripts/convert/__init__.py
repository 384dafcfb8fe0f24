"""Conversion of other projects' DPO configurations to overrides."""
