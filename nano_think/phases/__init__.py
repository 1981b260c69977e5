"""Run functions that the phase configs name."""
