"""Other ways to compute the same step, in less time or memory, and the benchmark that tells them apart."""
