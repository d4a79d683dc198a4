"""The ``docker`` compute: the same run in a container, on any engine that the Docker SDK reaches.

compute.py      the verbs
request.py      JobSpec -> the container's document; pure
arguments.py    ``docker run``'s arguments (-A) -> that document; pure
reach.py        can the container reach the tracking store? what must be mounted?
program.py      what the supervisor does: make the container, hand it everything, start it
watch.py        and then: watch it, stop it, bring home what it left
mirror.py       the container's spool -> the run folder's; tail.py and scripts.py are its other end
copying.py      folders in and out as tar streams
images.py       the image, found or pulled
environments.py the locked environment in a volume or an image
diagnosis.py    what the engine says -> why the job ended; pure
users.py        user names -> numbers; pure
engine.py       the only door to the Docker SDK
ssh.py          an engine behind ssh
"""

from .compute import DockerCompute

__all__ = ["DockerCompute"]
