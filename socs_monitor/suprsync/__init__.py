"""The contract with SupRsync: its tables, and the rules by which rows are written. Nothing else knows the tables."""
