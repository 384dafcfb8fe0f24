"""The GPU check: exactness, memory and speed on this machine; see `check`."""
