"""Tasks of lm-evaluation-harness, on a model that is loaded already."""
