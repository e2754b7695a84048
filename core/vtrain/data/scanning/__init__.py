"""Files to samples: the ledger, and what becomes of every file."""
