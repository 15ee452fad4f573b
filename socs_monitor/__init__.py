"""PysmurfMonitor: the OCS agent that registers SMuRF files in the SupRsync database."""

__version__ = "0.1.0"
