"""Exact speed-ups of TRL's `DPOTrainer`, each of which can be switched off."""
