"""How good a segmentation is, from arrays: scores, statistics, calibration, tables, the report.

Predicted and reference labels with their affine come in; scores by class and case, intervals, and
pages that show them go out. Files of labels are read elsewhere, by `data`.
"""
