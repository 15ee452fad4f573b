"""OCS feeds: session messages, metadata and statistics."""
