"""From the files that users have to batches: index formats, splits, shards, loaders, sample data."""
