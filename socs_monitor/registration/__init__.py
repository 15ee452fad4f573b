"""From an accepted registration to its row: look up, hash, register, re-check."""
