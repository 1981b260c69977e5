"""From text to batches: sources, splits, shards, packing, sampling."""
