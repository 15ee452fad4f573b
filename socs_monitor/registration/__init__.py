"""From an accepted registration to a row: look up, hash, register, re-check."""
