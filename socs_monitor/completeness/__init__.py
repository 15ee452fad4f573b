"""The disk compared with the database and the spool."""
