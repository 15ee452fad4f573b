"""Comparison of the disk with the database and the spool, and correction of what does not agree."""
