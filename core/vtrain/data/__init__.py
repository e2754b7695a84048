"""Files to batches: ledger, buckets, caches, order."""
