"""Layers with keyword constructors."""
