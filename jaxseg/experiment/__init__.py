"""From a config to a finished run, and what is done with one.

A validated config comes in and becomes networks, data and steps; training, assessment, prediction,
evaluation, export and replay go on from there. Each verb at the door calls one of these files.
"""
