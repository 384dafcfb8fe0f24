"""What the fuzzers are made of."""
