"""Sampling and generation over the cache. No Lightning, no Hydra."""
