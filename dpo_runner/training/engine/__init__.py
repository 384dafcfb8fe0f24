"""Exact speed-ups of TRL's `DPOTrainer`; each can be switched off."""
