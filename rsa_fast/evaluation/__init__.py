"""Evaluation of trained encoders: scores, detection, feature statistics and exports."""
