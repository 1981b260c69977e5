"""Whole expert networks, one file each."""
