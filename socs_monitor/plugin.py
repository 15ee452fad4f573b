"""The OCS plugin table: the agent classes of this package."""

package_name = "socs_monitor"
agents = {"PysmurfMonitor": {"module": "socs_monitor.agent", "entry_point": "main"}}
