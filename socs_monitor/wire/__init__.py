"""The UDP port and the wire format: from datagrams to typed messages. Knows no files, database or OCS."""
