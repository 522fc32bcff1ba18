"""Benchmarks: `make bench`. Results are ratios and rates of one run on one machine, written to bench/results/."""
