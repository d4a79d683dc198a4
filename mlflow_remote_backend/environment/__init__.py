"""Environments: what a project declares becomes a lock, the lock becomes the same software wherever the job runs.

    spec.load            project folder -> EnvSpec           what is declared; pure but for reading files
    locking.lock         EnvSpec -> EnvironmentRef           solved once, cached, or a committed lock
    locking.write_lock   EnvSpec -> a lock file              for `mlflow-remote lock PROJECT`
    materialise          EnvironmentRef -> prefix            verified, built once, at its final path
    activation           prefix -> environment variables     what activating it would set
    cache                which environments are there        `cache.hit` is the warm path; prune

Importing this package, ``cache`` or ``activation`` loads the standard library only: they stand on the path of every
start. Credentials of channels and indexes are never part of a value here: a URL holds ``${NAME}`` in their place, and
:func:`indexes.secrets` collects the values when they are needed.
"""
