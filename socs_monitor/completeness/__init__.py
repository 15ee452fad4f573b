"""What the disk holds against what database and spool say."""
