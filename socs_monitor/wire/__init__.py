"""The UDP port and the wire format: from datagrams to typed messages. Knows no files, no database and no OCS."""
