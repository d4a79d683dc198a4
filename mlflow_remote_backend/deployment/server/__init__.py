"""What runs where the model is served: files that need nothing of ours, copied to where the deployment lives.

keeper.py   holds the port, starts the servers, replaces them without closing it; standard library only
ask.py      hands over one request from a client that cannot reach the port
serve.py    MLflow's own scoring server around one model, in the model's environment
"""
