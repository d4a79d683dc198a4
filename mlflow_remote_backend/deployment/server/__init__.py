"""What runs where the model is served: two files that need nothing of ours, copied to where the deployment lives.

keeper.py   holds the port, starts the servers, replaces them without closing it; standard library only
serve.py    MLflow's own scoring server around one model, in the model's environment
"""
