"""The OCS plugin table: which agent classes this package provides."""

package_name = "socs_monitor"
agents = {"PysmurfMonitor": {"module": "socs_monitor.agent", "entry_point": "main"}}
