"""What banger's tests and benchmarks need and others may use."""
