"""Pure tensor functions; each fast path has a plain twin beside it."""
