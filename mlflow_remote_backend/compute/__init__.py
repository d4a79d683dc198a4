"""The places that run jobs. Each is one file (or folder) that implements :class:`~.base.Compute`."""
