"""PysmurfMonitor: the OCS agent that registers SMuRF files in the SupRsync database."""

__version__ = "0.1.0"

# Defaults shared by the agent and the `socs-monitor` command. They are here because importing them is free.
INSTANCE = "pysmurf-monitor"
DB_PATH = "/data/so/databases/suprsync.db"
UDP_PORT = 8200
