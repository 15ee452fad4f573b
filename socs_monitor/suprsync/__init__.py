"""The contract with SupRsync: its tables, and the rules for writing rows. No other package knows the tables."""
