"""Perplexity, n-gram baselines, routing analysis, statistics, reports."""
