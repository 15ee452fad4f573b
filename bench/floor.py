"""The bare work as a baseline: receive, parse JSON, open and hash the file, insert in batches; nothing else.

There is no durability before the commit, no validation, no log, no router and no re-check of files, so this is a lower
bound of what any agent costs.
"""

from __future__ import annotations

import hashlib
import json
import select
import socket
import sqlite3
import sys
import time

_BATCH = 1000
_BUFFER = 32 << 20
_SO_RCVBUFFORCE = 33
_SCHEMA = """
CREATE TABLE IF NOT EXISTS supersync_v0 (
    id INTEGER PRIMARY KEY, local_path VARCHAR NOT NULL, local_md5sum VARCHAR NOT NULL,
    archive_name VARCHAR NOT NULL, remote_path VARCHAR NOT NULL, timestamp FLOAT NOT NULL, remote_md5sum VARCHAR,
    copied FLOAT, removed FLOAT, failed_copy_attempts INTEGER, deletable BOOLEAN, "ignore" BOOLEAN)
"""
_INSERT = """
INSERT INTO supersync_v0 (local_path, local_md5sum, archive_name, remote_path, timestamp, failed_copy_attempts,
    deletable, "ignore") VALUES (?, ?, ?, ?, ?, 0, 1, 0)
"""


def row(datagram: bytes, now: float) -> tuple[str, str, str, str, float]:
    """Return the row for a message, including the MD5 sum of its file."""
    message = json.loads(datagram)
    payload = message["payload"]
    path = payload["path"]
    with open(path, "rb") as file:
        md5 = hashlib.file_digest(file, _md5).hexdigest()
    remote = f"{str(now)[:5]}/{message['id']}/{payload.get('action_ts')}_{payload.get('action')}/{path.split('/')[-1]}"
    return path, md5, payload.get("archive_name", "smurf"), remote, now


def _md5() -> hashlib._Hash:
    return hashlib.md5(usedforsecurity=False)


def receive(inlet: socket.socket, gather_s: float) -> list[bytes]:
    """Wait for a datagram and return it with those that arrive within `gather_s` seconds after it.

    With 0, only datagrams that have already arrived are added.
    """
    datagrams = [inlet.recv(65_536)]
    until = time.monotonic() + gather_s
    while len(datagrams) < _BATCH:
        try:
            datagrams.append(inlet.recv(65_536, socket.MSG_DONTWAIT))
        except BlockingIOError:
            left = until - time.monotonic()
            if left <= 0:
                break
            select.select([inlet], [], [], left)
    return datagrams


def main(port: int, db_path: str, gather_s: float) -> None:
    """Register files until the process is killed."""
    database = sqlite3.connect(db_path)
    database.execute(_SCHEMA)
    database.commit()
    inlet = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    try:
        inlet.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER)
    except PermissionError:
        inlet.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
    inlet.bind(("127.0.0.1", port))
    while True:
        datagrams = receive(inlet, gather_s)
        now = time.time()
        database.executemany(_INSERT, [row(datagram, now) for datagram in datagrams])
        database.commit()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], float(sys.argv[3]))
