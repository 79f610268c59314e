"""What a pre-trained encoder is worth: scores, detection, feature statistics and exports."""
