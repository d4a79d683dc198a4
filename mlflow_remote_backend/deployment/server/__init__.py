"""What runs where the model is served: files that need nothing of ours, but for prepare.py, and are copied there.

keeper.py   holds the port, starts the servers, replaces them without closing it; standard library only
ask.py      hands over one request from a client that cannot reach the port
prepare.py  on Kubernetes: fetches the model and makes its environment; needs this package, and is not copied
pod.py      on Kubernetes: opens the port and starts the servers; standard library only
serve.py    MLflow's own scoring server around one model, in the model's environment
"""
