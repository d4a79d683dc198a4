"""Deployments to a Kubernetes cluster.

    manifest.py   a spec -> Deployment, Service, autoscaler, disruption budget, Ingress, Secret; pure
    rollout.py    what the API shows of them -> how far a revision is, or why it does not come up; pure
    preflight.py  before anything is created: could it run here?
    logs.py       the servers' log, of pods that come and go
    target.py     the verbs

Everything is owned by the Deployment, which says in annotations what it serves: nothing is on the client's disk.
"""
