"""Specs to networks, and networks to disk: safetensors, plain spec, provenance."""
