"""What agent and command agree on where nobody says otherwise. Imports nothing, so that a quick command stays quick."""

INSTANCE = "pysmurf-monitor"
DB_PATH = "/data/so/databases/suprsync.db"
UDP_PORT = 8200
