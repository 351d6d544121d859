"""The folder of a run on disk: who may write there, and everything that is written.

Arrays, texts and numbers come in as training makes them; checkpoints, logs, the identity of what
computed them and weights by name lie in the folder, and are read back from there.
"""
