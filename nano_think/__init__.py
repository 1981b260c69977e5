"""nano_think: small language models made of different kinds of experts. Importing it loads nothing heavy."""

__version__ = "0.1.0"
