"""The retraining loop on Temporal: collect, train, evaluate, store, promote, and again, through kills and restarts."""
