"""Torchmetrics objects: per-domain loss and routing statistics."""
