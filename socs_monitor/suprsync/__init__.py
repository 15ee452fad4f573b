"""The contract with SupRsync: its tables and the rules for writing rows. Nothing else knows the tables."""
